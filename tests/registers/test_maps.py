"""Attention maps against NumPy, and colors in a common basis."""

from typing import Any

import jax
import numpy as np
import pytest

from dsr_jax.registers.maps import map_blocks, principal_colors
from dsr_jax.registers.statistics import StackRun


def run(registers: list[int]) -> StackRun:
    """Activations of two blocks: two registers, four patches, one learned key."""
    random = np.random.default_rng(0)
    outputs = random.standard_normal((2, 3, 6, 8), np.float32)
    outputs[1, :, 4] *= 9
    q = random.standard_normal((2, 3, 6, 2, 4), np.float32)
    k = random.standard_normal((2, 3, 7, 2, 4), np.float32)
    sown: dict[str, Any] = {"block_out": (outputs,), "attn": {"qk": ((q, k),)}}
    return StackRun(sown, slice(2, None), registers, (2, 2))


@pytest.mark.parametrize("registers", [[0, 1], []])
def test_attention_of_the_strongest_token_and_of_registers(registers: list[int]) -> None:
    given = run(registers)
    found = jax.jit(lambda sown: map_blocks(given._replace(sown=sown)))(given.sown)
    q, k = given.sown["attn"]["qk"][0]
    scores = np.einsum("lbshk,lbmhk->lbhsm", q, k) / 2
    weights = np.exp(scores)
    weights = (weights / weights.sum(-1, keepdims=True)).mean(2)[..., 3:]
    tokens = given.sown["block_out"][0][:, :, 2:]
    strongest = np.linalg.norm(tokens, axis=-1).argmax(-1)
    assert (strongest[1] == 2).all()
    for block, image in np.ndindex(2, 3):
        want = weights[block, image, 2 + strongest[block, image]]
        np.testing.assert_allclose(found.strongest[block, image], want, rtol=1e-5)
    if registers:
        np.testing.assert_allclose(found.registers, weights[:, :, :2].mean(2), rtol=1e-5)
    else:
        assert np.isnan(found.registers).all()
    np.testing.assert_array_equal(found.tokens, tokens)


def test_tokens_that_are_not_finite_are_gray() -> None:
    tokens = np.random.default_rng(0).standard_normal((1, 9, 6))
    want = principal_colors([tokens[:, 2:]])[0]
    tokens[0, 0, 1], tokens[0, 1, 2] = np.nan, np.inf
    found = principal_colors([tokens])[0]
    assert (found[0, :2] == 128).all()
    np.testing.assert_array_equal(found[:, 2:], want)
    assert (principal_colors([np.full_like(tokens, np.nan)])[0] == 128).all()


def test_equal_tokens_have_equal_colors_in_all_networks() -> None:
    random = np.random.default_rng(0)
    first = random.standard_normal((2, 9, 6)) * [5, 3, 2, 0.1, 0.1, 0.1]
    other = random.standard_normal((2, 9, 4))
    colors = principal_colors([first, first[::-1].copy(), other])
    np.testing.assert_array_equal(colors[0], colors[1][::-1])
    assert colors[2].shape == (2, 9, 3) and colors[0].dtype == np.uint8
    # The first component is the first axis, up to its sign.
    order = np.corrcoef(colors[0][..., 0].ravel().astype(float), first[..., 0].ravel())[0, 1]
    assert abs(order) > 0.95
