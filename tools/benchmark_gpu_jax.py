"""The JAX side of `tools/benchmark.py gpu`: it also writes the weights and inputs of the other."""

import argparse
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from dsr_jax import build
from dsr_jax import config as configs
from dsr_jax.build.fitting import RematChoice
from dsr_jax.core.rng import normal_per_sample, sample_keys, stream_key
from dsr_jax.parallel import shardings
from dsr_jax.telemetry.flops import train_step_flops
from tools.benchmark_encoder import EncoderSides
from tools.benchmark_gpu_side import Side
from tools.benchmark_sides import GUIDANCE, Ours, make_config, to_torch

SAMPLE_POINTS = 50
CHECKED_STEPS = 2


def prepare(row: str, args: argparse.Namespace) -> Side:
    """Returns our side of a row; see `benchmark_gpu.ROWS`."""
    jax.config.update("jax_default_matmul_precision", "default")
    kind, _, residual = row.partition("-")
    if kind in ("encoder", "ttr"):
        return _prepare_encoder(row, args)
    config = make_config(args.size, args.batch, True, args.remat)
    config.precision.compute = "bfloat16"
    config.precision.residual = "bfloat16" if residual else "float32"
    points = 4 if args.size == "tiny" else SAMPLE_POINTS
    config.sample.num_points, config.sample.guidance = points, GUIDANCE
    configs.apply_overrides(config, args.overrides)
    configs.check(config)
    ours = Ours(config)
    ours.start()
    path = args.folder / "weights.npz"
    if not path.exists():
        np.savez(path, **to_torch(ours, ours.state.params))
    return _prepare_training(ours, args) if kind == "train" else _prepare_sampling(ours, args)


def _fit(ours: Ours) -> list[RematChoice]:
    """Gives ours the step that a run takes; returns a list for the choice of its policy."""
    choices: list[RematChoice] = []
    config, optimizer, abstract = ours.config, ours.optimizer, ours.abstract

    def make_step(policy: str) -> Any:
        network = build.with_remat(config, ours.model, policy)
        return build.make_step(config, network, ours.space, optimizer, abstract)

    rows = shardings.batch_sharding(ours.mesh, ours.rules)
    ours.step = build.make_fitting_step(config, make_step, abstract, rows, choices.append)
    return choices


def _prepare_training(ours: Ours, args: argparse.Namespace) -> Side:
    choices, inputs, losses = _fit(ours), {}, []
    for i in range(CHECKED_STEPS):
        times, noise, labels = ours.random_inputs()
        inputs |= {f"t{i}": times, f"noise{i}": noise, f"labels{i}": labels}
        losses.append(ours.train())
    given = {f"batch_{name}": value for name, value in ours.batch.items()}
    path = args.folder / "train.npz"
    if not path.exists():
        np.savez(path, **{k: np.asarray(v) for k, v in (inputs | given).items()})

    def step() -> Any:
        ours.state, metrics = ours.step(ours.state, ours.batch, ours.variables)
        return metrics

    facts = {
        "images": args.batch,
        "flops": train_step_flops(ours.model.forward_flops(), args.batch),
        "remat": choices[0].policy if choices else ours.config.model.remat,
        "choice": choices[0].to_json() if choices else None,
    }
    return _side(step, facts, np.asarray(losses))


def _prepare_sampling(ours: Ours, args: argparse.Namespace) -> Side:
    config, count = ours.config, args.images
    indices = np.arange(count, dtype=np.uint32)
    labels = (indices % config.data.num_classes).astype(np.int32)
    sampler = build.make_sampler(config, ours.model, ours.space, ours.mesh, ours.rules)
    params = ours.state.params
    # The state's other parts are training's.
    ours.state = ours.state.replace(opt_state=None, ema={})
    key = stream_key(config.sample.seed, "sample_noise")
    noise = normal_per_sample(sample_keys(key, indices), ours.space.latent_shape)
    np.savez(args.folder / "sample.npz", noise=np.asarray(noise), labels=labels)

    def sample() -> Any:
        return sampler(params, {}, indices, labels).images

    images = np.asarray(sample()).astype(np.float32) - 127.5
    flops = 2 * (config.sample.num_points - 1) * count * ours.model.forward_flops()
    return _side(sample, {"images": count, "flops": flops}, images)


def _prepare_encoder(row: str, args: argparse.Namespace) -> Side:
    sides = EncoderSides(args.size == "tiny", args.images, "bfloat16")
    tokens, call = np.asarray(sides.plain(), np.float32), sides.plain
    if row == "ttr":
        call = sides.with_registers
        call()
    sizes = sides.sizes
    length = (sizes.image_size // sizes.patch_size) ** 2
    macs = sizes.depth * _encoder_block_macs(length, sizes.hidden_size, sizes.mlp_dim)
    macs += length * 3 * sizes.patch_size**2 * sizes.hidden_size
    return _side(call, {"images": args.images, "flops": 2 * macs * args.images}, tokens)


def _encoder_block_macs(length: int, width: int, hidden: int) -> int:
    """Returns the multiply-accumulates of a block without modulation, on one image."""
    return length * (4 * width**2 + 2 * width * hidden) + 2 * length**2 * width


def _side(call: Callable[[], Any], facts: dict[str, Any], results: np.ndarray) -> Side:
    device = jax.devices()[0]

    def figures() -> dict[str, Any]:
        return {
            **facts,
            "device": device.device_kind,
            "peak_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use"),
            "versions": {"jax": jax.__version__},
        }

    return Side(call, jax.block_until_ready, figures, results)
