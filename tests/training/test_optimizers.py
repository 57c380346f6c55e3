"""Learning rates and AdamW against the spec and PyTorch."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dsr_jax.core.errors import ConfigError
from dsr_jax.parallel.mesh import MeshShape, make_mesh
from dsr_jax.training.optimizers import LearningRate, Optimizer
from dsr_jax.training.state import TrainState, make_reshard

PARAMS = {"a": jnp.asarray([1.0, -2.0, 0.5]), "b": {"W": jnp.asarray([[0.3, 4.0]])}}


def gradients(step: int, scale: float = 1.0) -> dict:
    rng = np.random.default_rng(step)
    return jax.tree.map(
        lambda p: jnp.asarray(scale * rng.normal(size=p.shape), jnp.float32), PARAMS
    )


def official_rate(k: int, base: float, final: float, warm: int, end: int, zero: bool, kind: str):
    """Spec denoiser 8, word for word."""
    end, ratio = max(end, warm), final / base
    if k < warm:
        return base * ((k + 1) / warm if zero else 1.0)
    if k >= end:
        return base * ratio
    p = (k - warm) / max(end - warm, 1)
    if kind == "linear":
        return base * (1 - (1 - ratio) * p)
    return base * (ratio + (1 - ratio) * 0.5 * (1 + np.cos(np.pi * p)))


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize(("warm", "end"), [(0, 5), (3, 11), (4, 4), (6, 2), (50_040, 1_000_800)])
def test_rate_is_the_official_one(kind: str, zero: bool, warm: int, end: int) -> None:
    rate = LearningRate(3e-4, kind, 2e-5, warm, end, zero)
    steps = {0, 1, warm - 1, warm, warm + 1, (warm + end) // 2, end - 1, end, end + 1, 10 * end}
    for k in steps - {-1}:
        want = official_rate(k, 3e-4, 2e-5, warm, end, zero, kind)
        assert rate(k) == want
        np.testing.assert_allclose(jax.jit(rate)(jnp.int32(k)), want, rtol=2e-6)


def test_constant_rate_keeps_its_warm_up() -> None:
    rate = LearningRate(0.1, "constant", warmup_steps=4, warmup_from_zero=True)
    np.testing.assert_allclose([rate(k) for k in (0, 1, 3, 4, 999)], [0.025, 0.05, 0.1, 0.1, 0.1])


def test_a_warm_up_may_begin_at_zero() -> None:
    """JiT's first step has rate 0; the rate is reached one step later than in DSR."""
    rate = LearningRate(0.1, warmup_steps=4, warmup_from_zero=True, warmup_offset=0)
    np.testing.assert_allclose([rate(k) for k in (0, 1, 3, 4)], [0.0, 0.025, 0.075, 0.1])
    np.testing.assert_allclose(jax.jit(rate)(jnp.int32(3)), 0.075, rtol=1e-6)


@pytest.mark.parametrize(("clip", "decay", "b2"), [(0.0, 0.0, 0.95), (0.5, 0.1, 0.999)])
def test_updates_are_those_of_torch(clip: float, decay: float, b2: float) -> None:
    torch = pytest.importorskip("torch")
    optimizer = Optimizer(
        LearningRate(1e-2, "linear", 1e-3, 2, 9, True), b2=b2, weight_decay=decay, clip_norm=clip
    )
    leaves = [torch.nn.Parameter(torch.tensor(np.asarray(p))) for p in jax.tree.leaves(PARAMS)]
    official = torch.optim.AdamW(leaves, lr=1.0, betas=(0.9, b2), eps=1e-8, weight_decay=decay)
    params, state = PARAMS, optimizer.init(PARAMS)
    apply = jax.jit(optimizer.apply)
    for step in range(8):
        grads = gradients(step, scale=0.1 if step % 2 else 3.0)
        for leaf, grad in zip(leaves, jax.tree.leaves(grads), strict=True):
            leaf.grad = torch.tensor(np.asarray(grad))
        if clip:
            torch.nn.utils.clip_grad_norm_(leaves, clip)
        official.param_groups[0]["lr"] = float(optimizer.learning_rate(step))
        official.step()
        params, state = apply(grads, state, params, jnp.int32(step))
        for got, want in zip(jax.tree.leaves(params), leaves, strict=True):
            np.testing.assert_allclose(got, want.detach().numpy(), rtol=3e-6, atol=1e-7)


def test_clipping_divides_by_norm_plus_epsilon() -> None:
    """At a norm of the size of torch's 1e-6 the difference to optax is a factor of two."""
    optimizer = Optimizer(LearningRate(1.0), clip_norm=1e-6)
    tiny = {"a": jnp.asarray([1e-6])}
    _, state = optimizer.apply(tiny, optimizer.init(tiny), tiny, jnp.int32(0))
    np.testing.assert_allclose(optax.tree.get(state, "mu")["a"], 0.1 * 0.5e-6, rtol=1e-5)


def test_frozen_parameters_stay_and_count_in_no_norm() -> None:
    optimizer = Optimizer(LearningRate(0.1), weight_decay=0.5, freeze=("b/W",))
    assert optimizer.trainable(PARAMS) == {"a": True, "b": {"W": False}}
    loss = lambda p: sum(jnp.sum(x**2) for x in jax.tree.leaves(optimizer.freeze_params(p)))  # noqa: E731
    grads = jax.grad(loss)(PARAMS)
    np.testing.assert_array_equal(grads["b"]["W"], 0.0)
    state = optimizer.init(PARAMS)
    assert {name: set(optax.tree.get(state, name)) for name in ("mu", "nu")} == {
        "mu": {"a"},
        "nu": {"a"},
    }, "frozen parameters have no moments"
    new, after = optimizer.apply(grads, state, PARAMS, jnp.int32(0))
    assert jax.tree.structure(after) == jax.tree.structure(state)
    np.testing.assert_array_equal(new["b"]["W"], PARAMS["b"]["W"])
    assert np.all(np.asarray(new["a"]) != np.asarray(PARAMS["a"]))
    boxed = jax.tree.map(lambda p: nn.LogicallyPartitioned(p, (None,) * p.ndim), PARAMS)
    boxes = optax.tree.get(optimizer.init(boxed), "mu")
    assert set(boxes) == {"a"} and isinstance(boxes["a"], nn.LogicallyPartitioned)


def test_frozen_parameters_keep_their_layout_where_moments_are_divided() -> None:
    mesh = make_mesh(MeshShape(data=1, fsdp=2), jax.devices()[:2])
    whole, split = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("fsdp",)))
    params = {"a": jnp.arange(4.0), "b": {"W": jnp.ones(2)}}

    def placed(tree: Any, sharding: NamedSharding) -> Any:
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=sharding if x.shape else whole
            ),
            tree,
        )

    for freeze, layout in (((), split), (("b",), whole)):
        moments = jax.eval_shape(Optimizer(LearningRate(0.1), freeze=freeze).init, params)
        state = TrainState(
            step=jnp.int32(0),
            params=placed(params, whole),
            ema={},
            opt_state=placed(moments, split),
        )
        reshard = make_reshard(state)
        assert reshard is not None
        found = jax.jit(reshard)(params)
        assert found["a"].sharding.is_equivalent_to(split, 1)
        assert found["b"]["W"].sharding.is_equivalent_to(layout, 1)
    assert make_reshard(state.replace(opt_state=placed(moments, whole))) is None


@pytest.mark.parametrize(
    ("freeze", "trained"),
    [(("b",), {"a"}), (("*",), set()), (("?",), set()), (("a", "b/*"), set()), ((), {"a", "b/W"})],
)
def test_freeze_patterns_match_whole_levels(freeze: tuple[str, ...], trained: set[str]) -> None:
    kept = Optimizer(LearningRate(0.1), freeze=freeze).trainable(PARAMS)
    flags = {"a": kept["a"], "b/W": kept["b"]["W"]}
    assert {name for name, flag in flags.items() if flag} == trained


@pytest.mark.parametrize("pattern", ["W", "pos", "B", "a/b"])
def test_a_pattern_that_matches_nothing_is_named(pattern: str) -> None:
    with pytest.raises(ConfigError, match=f"'{pattern}' matches no parameter"):
        Optimizer(LearningRate(0.1), freeze=(pattern,)).trainable(PARAMS)


@pytest.mark.parametrize(
    ("key", "make"),
    [
        ("lr", lambda: LearningRate(0.0)),
        ("lr", lambda: LearningRate(float("nan"))),
        ("schedule", lambda: LearningRate(0.1, "step")),
        ("final_lr", lambda: LearningRate(0.1, final=-1.0)),
        ("warmup_steps", lambda: LearningRate(0.1, warmup_steps=-1)),
        ("warmup_offset", lambda: LearningRate(0.1, warmup_offset=2)),
        ("decay_end_steps", lambda: LearningRate(0.1, "cosine")),
        ("b1", lambda: Optimizer(LearningRate(0.1), b1=1.0)),
        ("b2", lambda: Optimizer(LearningRate(0.1), b2=-0.1)),
        ("eps", lambda: Optimizer(LearningRate(0.1), eps=0.0)),
        ("weight_decay", lambda: Optimizer(LearningRate(0.1), weight_decay=-1.0)),
        ("clip_norm", lambda: Optimizer(LearningRate(0.1), clip_norm=float("inf"))),
        ("freeze", lambda: Optimizer(LearningRate(0.1), freeze="pos_embed")),
    ],
)
def test_nonsense_is_refused_by_key(key: str, make) -> None:  # noqa: ANN001
    with pytest.raises(ConfigError, match=rf"config\.optim\.{key}="):
        make()
