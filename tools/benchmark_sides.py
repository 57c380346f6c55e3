"""JAX and PyTorch sides of `tools/benchmark.py`, and the checks that both compute the same."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from dsr_jax import build
from dsr_jax import config as configs
from dsr_jax.convert.lightningdit import lightningdit_rules
from dsr_jax.convert.rules import flax_to_torch
from dsr_jax.core.errors import NumericsError
from dsr_jax.core.rng import normal_per_sample, sample_keys, stream_key, uniform_per_sample
from dsr_jax.core.typing import Array, Params, PyTree
from dsr_jax.diffusion.samplers import time_grid
from dsr_jax.models.dit import DIT, REGISTER_START
from dsr_jax.parallel import shardings
from dsr_jax.parallel.mesh import MeshShape, make_mesh
from dsr_jax.training.state import TrainState

if TYPE_CHECKING:
    from tools.torch_reference import TorchLightningDiT, Trainer

TOLERANCE = {"output": 5e-5, "loss": 5e-5, "parameters": 2e-4, "EMA": 2e-4}
DIFFERENCE_REMEDY = "timings of different computations cannot be compared; find the difference"
SAMPLE_BATCH, SAMPLE_STEPS, GUIDANCE = 4, 10, 1.5


class Latents:
    """Input space whose images already are latents, so that a step runs only the denoiser.

    Args:
      size: Height and width of a latent.
      channels: Channels of a latent.
    """

    def __init__(self, size: int, channels: int) -> None:
        self.latent_shape = (size, size, channels)

    def encode(self, variables: PyTree, images: Array, keys: Array | None = None) -> Array:
        """Returns `images` unchanged."""
        return images

    def decode(self, variables: PyTree, latents: Array) -> Array:
        """Scales latents into [0, 1]."""
        return 0.5 + latents / 8


def make_config(size: str, batch: int, registers: bool, remat: str) -> configs.ConfigDict:
    """Returns the config of one model; `remat` "" keeps the default."""
    config = configs.base_config()
    tiny = size == "tiny"
    config.model.update(
        {"hidden_size": 32, "depth": 3, "num_heads": 2} if tiny else dict(DIT[size])
    )
    config.registers.num = 0 if not registers else 4 if tiny else 36
    config.registers.start = 0 if not registers else 1 if tiny else REGISTER_START[size]
    config.model.remat = remat or config.model.remat
    config.data.num_classes = 10 if tiny else 1000
    config.data.image_size, config.data.channels = (4, 8) if tiny else (16, 768)
    config.data.global_batch = batch
    config.objective.prediction = "velocity"
    config.sample.num_points, config.sample.guidance = SAMPLE_STEPS + 1, GUIDANCE
    configs.check(config)
    return config


class Ours:
    """Training step and sampler, built as the entry points build them, on one device.

    Args:
      config: From `make_config`.
    """

    def __init__(self, config: configs.ConfigDict) -> None:
        self.config = config
        self.space = Latents(config.data.image_size, config.data.channels)
        self.mesh = make_mesh(MeshShape(1, 1, 1), jax.devices()[:1])
        self.rules = build.make_rules(config)
        self.model = build.make_model(config, self.space)
        self.optimizer = build.make_optimizer(config)
        self.abstract, self._init = build.make_state(
            config, self.model, self.space, self.optimizer, self.mesh, self.rules
        )
        step = build.make_step(config, self.model, self.space, self.optimizer)
        rows = shardings.batch_sharding(self.mesh, self.rules)
        self.step = build.jit_step(step, self.abstract, rows, self.mesh)
        rng = np.random.default_rng(0)
        size = config.data.global_batch
        self.batch = {
            "image": rng.standard_normal((size, *self.space.latent_shape), np.float32),
            "label": rng.integers(0, config.data.num_classes, size).astype(np.int32),
            "index": np.arange(size, dtype=np.uint32),
        }
        self.variables: PyTree = {}

    def start(self) -> None:
        """Creates the state; no parameter is zero, so that every part of the network matters."""
        layout = jax.tree.map(lambda leaf: leaf.sharding, self.abstract)
        self.state = jax.jit(_all_nonzero, out_shardings=layout, donate_argnums=0)(self._init())
        self.batch = jax.device_put(self.batch, shardings.batch_sharding(self.mesh, self.rules))

    def random_inputs(self) -> tuple[Array, Array, Array]:
        """Returns the times, noise and labels that the next step will sample."""

        def keys(stream: str) -> Array:
            key = stream_key(self.config.seed, stream, self.state.step)
            return sample_keys(key, self.batch["index"])

        section = self.config.objective
        dropped = uniform_per_sample(keys("label_dropout")) < section.label_dropout
        labels = np.where(dropped, self.config.data.num_classes, self.batch["label"])
        times = build.make_time_sampler(self.config)(uniform_per_sample(keys("time")))
        return times, normal_per_sample(keys("noise"), self.space.latent_shape), labels

    def train(self) -> float:
        """Runs one step and returns its loss."""
        self.state, metrics = self.step(self.state, self.batch, self.variables)
        jax.block_until_ready(self.state)
        return float(metrics["loss"])

    def compile(self) -> None:
        """Lowers and compiles the step for abstract arrays."""
        batch = {
            name: jax.ShapeDtypeStruct(rows.shape, rows.dtype) for name, rows in self.batch.items()
        }
        self.step.lower(self.abstract, batch, self.variables).compile()  # type: ignore[attr-defined]


def _all_nonzero(state: TrainState) -> TrainState:
    """Returns the state with small noise added to all parameters, and EMA weights equal to them."""
    leaves, structure = jax.tree.flatten(state.params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [
        leaf + 0.02 * jax.random.normal(key, leaf.shape)
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    params = jax.tree.unflatten(structure, moved)
    return state.replace(params=params, ema={name: params for name in state.ema})


def require_close(kind: str, what: str, ours: Any, theirs: Any) -> None:
    """Checks that two arrays agree: the largest difference relative to the largest value.

    Raises:
      NumericsError: If they differ by more than TOLERANCE[kind].
    """
    got, want = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    error = np.max(np.abs(got - want)) / np.max(np.abs(want))
    if not error <= TOLERANCE[kind]:
        raise NumericsError(
            f"ours and PyTorch's {what} differ by {error:.1e} (at most {TOLERANCE[kind]:.0e})",
            DIFFERENCE_REMEDY,
        )


def channels_first(x: Any) -> Any:
    """Converts an array [B, h, w, C] to a torch tensor [B, C, h, w]."""
    import torch

    return torch.from_numpy(np.array(np.moveaxis(np.asarray(x), -1, 1), order="C"))


def to_torch(ours: Ours, params: Params) -> dict[str, np.ndarray]:
    """Returns the parameters by their official names."""
    return flax_to_torch(jax.device_get(params), lightningdit_rules(ours.model))


def make_torch_reference(ours: Ours) -> "TorchLightningDiT":
    """Returns the PyTorch model with the parameters of ours."""
    import torch

    from tools.torch_reference import TorchLightningDiT

    names = (
        "input_size patch_size in_channels hidden_size depth num_heads mlp_ratio num_classes "
        "num_registers register_start"
    )
    reference = TorchLightningDiT(**{name: getattr(ours.model, name) for name in names.split()})
    state = to_torch(ours, ours.state.params)
    reference.load_state_dict({name: torch.from_numpy(np.array(x)) for name, x in state.items()})
    return reference


def make_trainer(ours: Ours, reference: "TorchLightningDiT") -> "Trainer":
    """Returns the PyTorch trainer of `reference`, with the settings of ours."""
    from tools.torch_reference import Trainer

    config = ours.config
    return Trainer(
        reference,
        lr=config.optim.lr,
        betas=(config.optim.b1, config.optim.b2),
        ema_decay=config.ema.decays[0],
        label_dropout=config.objective.label_dropout,
        null_label=config.data.num_classes,
    )


def check_training(ours: Ours, trainer: "Trainer") -> None:
    """Runs one step on both sides and compares outputs, loss, parameters and EMA weights.

    Raises:
      NumericsError: If they differ.
    """
    import torch

    from tools.torch_reference import RandomInputs

    t, x0, labels = (np.array(x) for x in ours.random_inputs())
    inputs = RandomInputs(torch.from_numpy(t), channels_first(x0), torch.from_numpy(labels).long())
    forward = jax.jit(build.make_denoise_fn(ours.model))
    with torch.no_grad():
        out = trainer.model(inputs.x0, inputs.t, inputs.labels)
    got = channels_first(forward(ours.state.params, x0, t, labels))
    require_close("output", "outputs", got, out)
    loss = trainer.step(channels_first(ours.batch["image"]), inputs.labels, inputs)
    require_close("loss", "losses", ours.train(), loss)
    pairs = (
        ("parameters", ours.state.params, trainer.model),
        ("EMA", next(iter(ours.state.ema.values())), trainer.ema),
    )
    for kind, params, model in pairs:
        state = model.state_dict()
        for name, value in to_torch(ours, params).items():
            require_close(kind, f"{name} ({kind} after a step)", value, state[name])


def torch_batch(ours: Ours) -> tuple[Any, Any]:
    """Returns our training batch as torch tensors: data [B, C, h, w] and labels [B]."""
    import torch

    labels = np.array(ours.batch["label"], np.int64)
    return channels_first(ours.batch["image"]), torch.from_numpy(labels)


def make_samplers(
    ours: Ours, reference: "TorchLightningDiT"
) -> tuple[Callable[[], np.ndarray], Callable[[], np.ndarray]]:
    """Returns our sampler and PyTorch's, from the same noise; each returns uint8 [n, h, w, C]."""
    import torch

    from tools.torch_reference import sample_euler

    null_label = ours.config.data.num_classes
    indices, labels = np.arange(SAMPLE_BATCH), np.arange(SAMPLE_BATCH) % null_label
    sampler = build.make_sampler(ours.config, ours.model, ours.space, ours.mesh, ours.rules)
    key = stream_key(ours.config.sample.seed, "sample_noise")
    noise = normal_per_sample(sample_keys(key, indices), ours.space.latent_shape)
    start, classes = channels_first(noise), torch.from_numpy(labels)
    times = [float(t) for t in time_grid(SAMPLE_STEPS + 1, "linear", "velocity")]

    def sample() -> np.ndarray:
        return np.asarray(sampler(ours.state.params, {}, indices, labels).images)

    def sample_torch() -> np.ndarray:
        latents = sample_euler(reference, start, classes, times, GUIDANCE, null_label)
        pixels = (ours.space.decode({}, latents).clamp(0, 1) * 255).to(torch.uint8)
        return pixels.permute(0, 2, 3, 1).numpy()

    return sample, sample_torch


def check_samples(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Checks that uint8 samples of both sides agree.

    Raises:
      NumericsError: If they differ.
    """
    difference = np.abs(ours.astype(int) - theirs)
    # The cast truncates: next to a level's edge, rounding decides between adjacent levels.
    if difference.max() > 1 or np.mean(difference > 0) > 1e-3:
        raise NumericsError(
            f"ours and PyTorch's samples differ in {np.mean(difference > 0):.1%} of the values, "
            f"by up to {difference.max()} of 255 levels",
            DIFFERENCE_REMEDY,
        )
