"""Stacks split into layers before a sampler's loop give the results of the stacks."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsr_jax.diffusion.objectives import make_objective
from dsr_jax.models import blocks, transformer
from dsr_jax.models.conditioning import TextCondition
from dsr_jax.models.denoiser import Denoiser
from dsr_jax.models.dit import LightningDiT
from dsr_jax.models.dit_dh import DiTDH
from dsr_jax.models.jit import JiT
from dsr_jax.models.precision import Precision
from dsr_jax.models.sit import SiT
from dsr_jax.models.tuning import TUNING
from dsr_jax.models.unstacked import UnstackedBlocks
from dsr_jax.sampling.sampler import ArraySampler, SamplerSettings, make_device_sampler

SIZES: dict[str, Any] = {
    **{"input_size": 4, "in_channels": 3, "num_classes": 5, "hidden_size": 16, "depth": 3},
    **{"num_heads": 2, "num_registers": 4, "register_start": 1},
}
HEAD = {"decoder_hidden_size": 24, "decoder_depth": 2, "decoder_num_heads": 2}
NETWORKS: dict[str, Any] = {
    "lightningdit": lambda **more: LightningDiT(**SIZES, attn_kv_bias=True, **more),
    "ditdh": lambda **more: DiTDH(**SIZES, **HEAD, register_gate=True, **more),
    "sit": lambda **more: SiT(**SIZES, use_qknorm=True, **more),
    "jit": lambda **more: JiT(
        **SIZES, patch_size=2, bottleneck_dim=8, num_class_tokens=2, class_token_start=2, **more
    ),
    "text": lambda **more: LightningDiT(**SIZES, condition_width=8, **more),
}


@pytest.fixture(autouse=True)
def gpu_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Splits as on a GPU."""
    for module in (blocks, transformer):
        monkeypatch.setattr(module, "tuning", lambda: TUNING["gpu"])


def inputs(name: str) -> tuple[Any, ...]:
    """Input, times, and labels or a text's condition, of two samples."""
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
    rows = jax.random.normal(jax.random.key(1), (2, 16, 8))
    labels = TextCondition(rows, jnp.array([0, 1])) if name == "text" else jnp.array([1, 5])
    return x, jnp.array([0.2, 0.9]), labels


def weights(network: Denoiser, *args: Any) -> Any:
    """Random parameters, none of which is zero."""
    shapes = nn.meta.unbox(jax.eval_shape(network.init, jax.random.key(0), *args))["params"]
    random = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: 0.3 * random.standard_normal(leaf.shape, np.float32), shapes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "compute"),
    [("lightningdit", "float32"), ("ditdh", "bfloat16"), ("jit", "float32"), ("text", "float32")],
)
def test_outputs_are_those_of_stacks(name: str, compute: str) -> None:
    network, args = NETWORKS[name](precision=Precision(compute)), inputs(name)
    params = weights(network, *args)

    def apply(params: Any, unstacked: bool) -> jax.Array:
        if unstacked:
            params = network.unstacked(params)
            stacks = [value for value in params.values() if isinstance(value, UnstackedBlocks)]
            assert len(stacks) == len(network.token_rows())
        return network.apply({"params": params}, *args)

    want, got = (jax.jit(apply, static_argnums=1)(params, flag) for flag in (False, True))
    assert float(jnp.std(want)) > 0.1
    # Rounding of matmuls of other shapes.
    np.testing.assert_allclose(got, want, atol=2e-6 if compute == "float32" else 2e-2, rtol=2e-5)


def test_only_what_is_computed_in_bfloat16_is_stored_so() -> None:
    network, args = NETWORKS["ditdh"](precision=Precision("bfloat16")), inputs("ditdh")
    params = nn.meta.unbox(jax.eval_shape(network.init, jax.random.key(0), *args))["params"]
    split = jax.eval_shape(network.unstacked, params)
    stack, head = split["enc_blocks_reg"], split["dec_blocks"]
    # Conditions of the head differ between tokens: each block has its own modulation.
    assert (len(stack.layers), len(head.layers), head.modulation) == (2, 2, None)
    assert "adaLN" not in stack.layers[0] and "adaLN" in head.layers[0]
    dtypes = {
        jax.tree_util.keystr(path): leaf.dtype.name
        for path, leaf in jax.tree_util.tree_leaves_with_path(stack)
    }
    assert set(dtypes.values()) == {"float32", "bfloat16"}
    for path, dtype in dtypes.items():
        linear = "kernel" in path or "bias" in path or "modulation" in path
        assert dtype == ("bfloat16" if linear else "float32"), path
    assert jax.tree.map(lambda x: x.dtype, split["t_embedder"]) == jax.tree.map(
        lambda x: x.dtype, params["t_embedder"]
    )


def test_a_loop_over_depth_stays_one(monkeypatch: pytest.MonkeyPatch) -> None:
    params = {"blocks_pre": {}, "blocks_reg": {}}
    assert NETWORKS["sit"](unroll="none").unstacked(params) is params
    monkeypatch.setattr(transformer, "tuning", lambda: TUNING["cpu"])
    assert NETWORKS["sit"](unroll="full").unstacked(params) is params


@pytest.mark.slow
def test_samples_are_those_of_stacks() -> None:
    network, args = NETWORKS["lightningdit"](), inputs("lightningdit")
    params = weights(network, *args)

    def images(prepare: Any) -> np.ndarray:
        sampler = make_device_sampler(
            lambda params, *args: network.apply({"params": params}, *args),
            make_objective("linear", "velocity"),
            SamplerSettings(method="heun", num_points=4, guidance=1.5),
            lambda variables, latents: 0.5 + latents / 8,
            latent_shape=(4, 4, 3),
            null_label=5,
            prepare=(prepare, prepare),
        )
        indices, labels = np.arange(4, dtype=np.uint32), np.array([0, 1, 2, 3], np.int32)
        return np.asarray(ArraySampler(sampler)(params, {}, indices, labels).images, int)

    want, got = images(lambda params: params), images(network.unstacked)
    assert len(np.unique(want)) > 20
    assert np.abs(got - want).max() <= 1 and (got != want).mean() < 0.01
