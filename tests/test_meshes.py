"""A training step from a config gives the same numbers however the mesh divides the work."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from dsr_jax import build
from dsr_jax import config as configs
from dsr_jax.core.errors import MeshError
from dsr_jax.core.trees import flatten_names, tree_bytes
from dsr_jax.parallel.axes import Constrain
from dsr_jax.parallel.shardings import batch_sharding, fetch, host_to_global
from dsr_jax.training.checkpoints import Checkpoints
from dsr_jax.training.state import TrainState
from tests.programs import quick_programs

REFERENCE = ((8, 1, 1), "fsdp")
FAMILIES: dict[str, dict[str, Any]] = {
    "lightningdit": {"patch_size": 2},
    # Its head stands on an encoder of one block without registers, and one with them.
    "ditdh": {
        "patch_size": 2,
        "decoder_hidden_size": 64,
        "decoder_depth": 1,
        "decoder_num_heads": 4,
    },
    "sit": {"use_swiglu": False, "use_rope": False, "use_rmsnorm": False, "learn_sigma": True},
    "jit": {
        "bottleneck_dim": 16,
        "num_class_tokens": 2,
        "class_token_start": 1,
        "use_qknorm": True,
    },
}
LAYOUTS = (
    ((1, 8, 1), "fsdp"),
    ((2, 2, 2), "fsdp"),
    ((1, 8, 1), "zero1"),
    ((2, 2, 2), "zero1"),
    ((2, 2, 2), "replicated"),
)
QUICK = {("lightningdit", case) for case in LAYOUTS[1:3]}
"""Compiling each takes seconds; the others are for patience."""
OTHERS = [
    pytest.param(family, case, marks=() if (family, case) in QUICK else pytest.mark.slow)
    for family in FAMILIES
    for case in LAYOUTS
]
TOLERANCE = 2e-5
"""Of an array's largest magnitude: sums over devices are rounded in another order."""

Case = tuple[tuple[int, int, int], str]


@pytest.fixture(scope="module", autouse=True)
def compiled_quickly(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Speed of the compiled programs is of no matter here."""
    with quick_programs(tmp_path_factory.mktemp("programs")):
        yield


def tiny_config(case: Case, family: str = "lightningdit", micro: int = 1) -> configs.ConfigDict:
    """Blocks before and with registers, of sizes that 8 devices divide."""
    sizes, rules = case
    config = configs.base_config()
    shared = {"name": family, "hidden_size": 32, "depth": 2, "num_heads": 4, "mlp_ratio": 6.0}
    config.model.update({**shared, "patch_size": 2, **FAMILIES[family]})
    config.optim.accumulate = micro
    config.registers.update(num=4, start=1)
    config.data.global_batch = 16
    config.mesh.update(dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)))
    config.sharding.rules = rules
    config.ema.decays = (0.5,)
    # With a small eps Adam's first update would be the gradient's sign, which rounding decides
    # where the gradient is tiny; with a small rate the update would hide behind the parameters.
    config.optim.update(lr=1.0, eps=1e-3, clip_norm=1.0)
    config.precision.matmul = "highest"
    return config


class Step:
    """What a start of the config would build, on noise for data and weights."""

    def __init__(self, case: Case, family: str = "lightningdit", micro: int = 1) -> None:
        config = tiny_config(case, family, micro)
        mesh, rules = build.make_mesh(config), build.make_rules(config)
        space, self.variables = build.make_space(config)
        model = build.make_model(config, space, Constrain(rules, mesh))
        optimizer = build.make_optimizer(config)
        self.abstract, self.init = build.make_state(config, model, space, optimizer, mesh, rules)
        sharding = batch_sharding(mesh, rules)
        step = build.make_step(config, model, space, optimizer, self.abstract)
        self.step = build.jit_step(step, self.abstract, sharding, mesh)
        random = np.random.default_rng(0)
        batch = {
            "image": random.integers(0, 256, (16, 8, 8, 1), np.uint8),
            "label": random.integers(0, 10, 16).astype(np.int32),
            "index": np.arange(16, dtype=np.uint32),
        }
        self.batch = host_to_global(batch, sharding, 16)

    def noisy(self) -> TrainState:
        """The first state with noise on it: layers that start from zeros pass no gradient."""
        random = np.random.default_rng(1)

        def noise(leaf: jax.Array) -> jax.Array:
            value = np.asarray(fetch(leaf)) + 0.1 * random.standard_normal(leaf.shape)
            return jax.device_put(value.astype(leaf.dtype), leaf.sharding)

        state = self.init()
        return state.replace(params=jax.tree.map(noise, state.params))

    def run(self) -> dict[str, np.ndarray]:
        """State and metrics after one step, by name."""
        state, metrics = self.step(self.noisy(), self.batch, self.variables)
        return flatten_names(fetch({"state": vars(state), "metrics": metrics}))


@functools.cache
def reference(family: str = "lightningdit") -> dict[str, np.ndarray]:
    """The step where every device holds all parameters and two samples."""
    return Step(REFERENCE, family).run()


def agree(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> None:
    """Loss, metrics, parameters, EMA weights and moments, all up to rounding."""
    assert got.keys() == want.keys()
    assert {"metrics/loss", "metrics/grad_norm", "state/step"} < want.keys()
    for name, value in want.items():
        scale = np.abs(value).max() + 1e-12
        np.testing.assert_allclose(
            got[name] / scale, value / scale, rtol=0, atol=TOLERANCE, err_msg=name
        )


@pytest.mark.parametrize(("family", "case"), OTHERS, ids=str)
def test_one_step_is_the_same_on_every_mesh(family: str, case: Case) -> None:
    agree(Step(case, family).run(), reference(family))


@pytest.mark.slow
def test_micro_batches_divide_their_gradients_too() -> None:
    agree(Step(((2, 2, 2), "zero1"), micro=2).run(), reference())


@pytest.mark.parametrize(
    "family",
    ["lightningdit", *(pytest.param(name, marks=pytest.mark.slow) for name in list(FAMILIES)[1:])],
)
def test_the_step_moves_every_parameter(family: str) -> None:
    """Else the comparison above would compare what nothing computes."""
    before = flatten_names(fetch(vars(Step(REFERENCE, family).noisy())["params"]))
    want = reference(family)
    for name, value in before.items():
        moved = np.abs(want[f"state/params/{name}"] - value).max()
        assert moved > 1000 * TOLERANCE * np.abs(value).max(), name


def held_fraction(tree: Any) -> float:
    """The part of a tree's bytes that one device holds."""
    leaves = jax.tree.leaves(tree)
    held = sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize for leaf in leaves
    )
    return held / tree_bytes(tree)


def test_fsdp_splits_parameters_ema_and_moments() -> None:
    state = Step(((1, 8, 1), "fsdp")).abstract
    for part in (state.params, state.ema, state.opt_state):
        assert 1 / 8 <= held_fraction(part) < 0.2
    assert held_fraction(Step(((2, 2, 2), "fsdp")).abstract.params) < 0.45
    assert held_fraction(Step(((2, 2, 2), "replicated")).abstract.params) == 1
    assert held_fraction(Step(REFERENCE).abstract.params) == 1


def test_zero1_splits_ema_and_moments_only() -> None:
    """On the devices, before and after a step."""
    built = Step(((1, 8, 1), "zero1"))
    first = built.noisy()
    after, _ = built.step(built.noisy(), built.batch, built.variables)
    for state in (first, after):
        for leaf in jax.tree.leaves(state.params):
            assert {shard.data.shape for shard in leaf.addressable_shards} == {leaf.shape}
        for part in (state.ema, state.opt_state):
            held = [0] * 8
            for leaf in jax.tree.leaves(part):
                for shard in leaf.addressable_shards:
                    held[shard.device.id] += shard.data.nbytes
            assert len(set(held)) == 1
            # What has no dimension of the model's width stays whole: 3 % of so small a model.
            assert 1 / 8 <= held[0] / tree_bytes(part) < 0.155


@pytest.mark.parametrize(
    ("saved", "opened"),
    [("fsdp", "zero1"), pytest.param("zero1", "replicated", marks=pytest.mark.slow)],
)
def test_a_checkpoint_of_one_preset_opens_under_another(
    tmp_path: Path, saved: str, opened: str
) -> None:
    one, other = Step(((1, 8, 1), saved)), Step(((2, 2, 2), opened))
    state = one.noisy()
    with Checkpoints(tmp_path, every_steps=1) as checkpoints:
        checkpoints.save(0, state)
        checkpoints.wait()
        restored, _ = checkpoints.restore(other.abstract)
    for leaf, like in zip(jax.tree.leaves(restored), jax.tree.leaves(other.abstract), strict=True):
        assert leaf.sharding == like.sharding
    want = flatten_names(fetch(vars(state)))
    for name, value in flatten_names(fetch(vars(restored))).items():
        np.testing.assert_array_equal(value, want[name], err_msg=name)


def test_tensor_parallelism_divides_heads_and_hidden_units() -> None:
    params = flatten_names(Step(((2, 2, 2), "fsdp")).abstract.params)
    for stack in ("blocks_pre", "blocks_reg"):
        for name, parts in {
            "attn/qkv/kernel": (1, 2, 1, 2, 1),
            "attn/proj/kernel": (1, 2, 1, 2),
            "mlp/w12/kernel": (1, 2, 1, 2),
            "mlp/w3/kernel": (1, 2, 2),
        }.items():
            leaf = params[f"{stack}/{name}"]
            shard = leaf.sharding.shard_shape(leaf.shape)
            assert tuple(np.floor_divide(leaf.shape, shard)) == parts, (name, leaf.shape)


@pytest.mark.parametrize(
    ("preset", "message"),
    [
        ("fsdp", "parameter bytes are split over fsdp; whole: t_embedder"),
        ("zero1", "of the optimizer and EMA bytes are split over fsdp"),
    ],
)
def test_a_width_that_fsdp_does_not_divide_is_refused(preset: str, message: str) -> None:
    config = tiny_config(((1, 8, 1), preset))
    config.model.update(hidden_size=36, num_heads=3)
    mesh, rules = build.make_mesh(config), build.make_rules(config)
    space, _ = build.make_space(config)
    model = build.make_model(config, space, Constrain(rules, mesh))
    with pytest.raises(MeshError, match=message):
        build.make_state(config, model, space, build.make_optimizer(config), mesh, rules)
