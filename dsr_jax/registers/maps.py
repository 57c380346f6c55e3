"""Token maps of a network for pictures: attention of chosen tokens, principal components."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsr_jax.core.typing import Array
from dsr_jax.registers.statistics import StackRun, attention_weights


class TokenMaps(NamedTuple):
    """Maps of the patch tokens of one stack of blocks.

    Attributes:
      tokens: The tokens [L, B, T, D].
      strongest: Attention of the patch with the largest norm to all patches, the mean over heads
        [L, B, T].
      registers: The same of the registers, the mean over them [L, B, T]; NaN without registers.
    """

    tokens: Any
    strongest: Any
    registers: Any


def map_blocks(run: StackRun) -> TokenMaps:
    """Returns the maps of a stack; to be compiled."""
    outputs, (q, k) = run.sown["block_out"][0], run.sown["attn"]["qk"][0]
    extra = k.shape[2] - outputs.shape[2]
    rows = np.asarray(run.registers, np.int32)

    def make(block: tuple[Array, Array, Array]) -> TokenMaps:
        tokens = block[0][:, run.patches].astype(jnp.float32)

        def attention(queries: Array) -> Array:
            weights = attention_weights(queries, block[2]).mean(axis=(1, 2))
            return weights[:, extra:][:, run.patches]

        strongest = jnp.argmax(jnp.linalg.norm(tokens, axis=-1), axis=1)
        query = jnp.take_along_axis(
            block[1][:, run.patches], strongest[:, None, None, None], axis=1
        )
        none = jnp.full(tokens.shape[:2], jnp.nan)
        registers = attention(block[1][:, rows]) if rows.size else none
        return TokenMaps(tokens, attention(query), registers)

    return jax.lax.map(make, (outputs, q, k))


def principal_colors(tokens: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Returns the first three principal components of tokens as colors, in one common basis.

    Args:
      tokens: Tokens [B, T, D] of several networks; those of one width D share a basis, so that
        equal colors are equal contents.

    Returns:
      uint8 [B, T, 3] for each. The 1 % and the 99 % quantile are the limits of each color. Tokens
      that are not finite are gray.
    """
    colors: list[np.ndarray] = [np.zeros((*each.shape[:2], 3), np.uint8) for each in tokens]
    for width in {each.shape[-1] for each in tokens}:
        chosen = [i for i, each in enumerate(tokens) if each.shape[-1] == width]
        rows = np.concatenate([tokens[i].reshape(-1, width) for i in chosen]).astype(np.float64)
        finite = np.isfinite(rows).all(axis=1)
        shown = np.full((len(rows), 3), 128, np.uint8)
        shown[finite] = _colors(rows[finite])
        pieces = np.split(shown, np.cumsum([tokens[i][..., 0].size for i in chosen])[:-1])
        for i, piece in zip(chosen, pieces, strict=True):
            colors[i] = piece.reshape(colors[i].shape)
    return colors


def _colors(rows: np.ndarray) -> np.ndarray:
    """Returns the colors of tokens [N, D], uint8 [N, 3]."""
    shown = np.zeros((len(rows), 3), np.uint8)
    if len(rows):
        centered = rows - rows.mean(axis=0)
        _, basis = np.linalg.eigh(centered.T @ centered)
        basis = basis[:, ::-1][:, :3]
        # The sign of a component is arbitrary: its largest weight is positive.
        largest = np.abs(basis).argmax(axis=0)
        basis = basis * np.sign(basis[largest, np.arange(basis.shape[1])])
        scores = centered @ basis
        low, high = np.quantile(scores, (0.01, 0.99), axis=0)
        scaled = np.clip((scores - low) / np.maximum(high - low, 1e-12), 0, 1)
        shown[:, : basis.shape[1]] = np.round(255 * scaled)
    return shown
