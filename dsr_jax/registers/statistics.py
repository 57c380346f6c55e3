"""Statistics of tokens after every block: norms, outliers, attention, rank and local content.

A compiled program reduces the activations of a batch to a few numbers per token (`TokenMeasures`);
`summarize` turns them into statistics by block on the host. What is measured is sown by the
networks, so a program that does not ask for it does not compute it.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsr_jax.core.errors import ConfigError
from dsr_jax.core.typing import Array, Params
from dsr_jax.models.denoiser import Denoiser
from dsr_jax.models.intervention import Intervention
from dsr_jax.models.text_to_image import TextToImage
from dsr_jax.models.transformer import DiffusionTransformer
from dsr_jax.models.vit import ViT
from dsr_jax.registers.outliers import split_norms

MAX_WEIGHTS = 2**24
"""Attention weights that are in memory at once, 64 MiB in float32."""

STATISTICS: Mapping[str, str] = {
    "norm_p50": "median norm of the patch tokens",
    "norm_p98": "98 % quantile of the norms",
    "norm_p999": "99.9 % quantile of the norms",
    "norm_max": "largest norm",
    "norm_kurtosis": "kurtosis of the norms, 3 for a normal distribution",
    "outlier_share": "fraction of the patch tokens that are outliers",
    "outlier_attention": "fraction of all attention that outliers receive",
    "register_attention": "fraction of all attention that registers receive",
    "effective_rank": "effective rank of an image's patch tokens",
    "neighbor_cosine": "cosine similarity of a patch token to its neighbors",
}
"""Statistics by block, and what they are."""


class TokenMeasures(NamedTuple):
    """Measures of the tokens after every block; T patches in row-major order.

    Attributes:
      norms: Norms of the patch tokens [L, B, T].
      cosine: Mean cosine similarity of each patch token to those above, below, left and right of it
        [L, B, T].
      rank: Effective rank of the centered patch tokens of an image [L, B].
      received: Attention that each patch receives, the mean over heads and queries [L, B, T]; with
        that of registers, other inserted tokens and learned keys it adds up to 1.
      to_registers: Attention that all registers receive [L, B].
    """

    norms: Any
    cosine: Any
    rank: Any
    received: Any
    to_registers: Any


def measure_denoiser(
    model: Denoiser, params: Params, x: Array, t: Array, *conditions: Array
) -> TokenMeasures:
    """Runs a denoiser and measures its tokens; to be compiled.

    Attention is that of the softmax: the learned gate of `config.registers.gate` is not applied.

    Args:
      model: A network with blocks; of one of text, those of its denoiser are measured.
      params: Its parameters.
      x: Noised input [B, h, w, C].
      t: Times [B], 0 = data, 1 = noise, for all networks.
      *conditions: Labels [B], or tokens [B, L] of text.

    Raises:
      ConfigError: If the network has no blocks of tokens.
    """
    stacks = run_denoiser(model, params, x, t, *conditions)
    parts = [measure_blocks(*stack) for stack in stacks]
    return TokenMeasures(*(jnp.concatenate(each) for each in zip(*parts, strict=True)))


def measure_encoder(
    model: ViT, params: Params, pixels: Array, intervention: Intervention | None = None
) -> TokenMeasures:
    """Encodes normalized images [B, H, W, 3] and measures the tokens; to be compiled.

    Registers are those that the encoder was trained with, and test-time registers if given.
    """
    return measure_blocks(*run_encoder(model, params, pixels, intervention))


class StackRun(NamedTuple):
    """What a scanned stack of blocks sowed.

    Attributes:
      sown: Intermediates of the stack: "block_out" [L, B, S, D] and "attn/qk", queries
        [L, B, S, H, K] and keys [L, B, E+S, H, K] with E learned keys in front.
      patches: Rows of the patches.
      registers: Rows of the registers.
      grid: Patches from top to bottom and from left to right.
    """

    sown: Mapping[str, Any]
    patches: slice
    registers: Sequence[int]
    grid: tuple[int, int]


def run_denoiser(
    model: Denoiser, params: Params, x: Array, t: Array, *conditions: Array
) -> list[StackRun]:
    """Runs a denoiser and returns what its stacks sowed; arguments as of `measure_denoiser`."""
    denoiser = model.denoiser if isinstance(model, TextToImage) else model
    if not isinstance(denoiser, DiffusionTransformer):
        raise ConfigError(
            f"{type(model).__name__} has no transformer blocks whose tokens could be measured",
            "set config.log.outliers=0, or derive it from models.transformer.DiffusionTransformer",
        )
    times = 1 - t if denoiser.reversed_time else t
    _, found = model.apply({"params": params}, x, times, *conditions, mutable=["intermediates"])
    sown = found["intermediates"]
    sown = sown["denoiser"] if isinstance(model, TextToImage) else sown
    return [
        StackRun(
            sown[rows.stack.name],
            slice(rows.patches, None),
            range(rows.registers[0], sum(rows.registers)),
            (denoiser.grid, denoiser.grid),
        )
        for rows in denoiser.token_rows()
    ]


def run_encoder(
    model: ViT, params: Params, pixels: Array, intervention: Intervention | None = None
) -> StackRun:
    """Runs an encoder and returns what its stack sowed; arguments as of `measure_encoder`."""
    _, sown = model.apply({"params": params}, pixels, intervention, mutable=["intermediates"])
    config = model.config
    grid = (pixels.shape[1] // config.patch_size, pixels.shape[2] // config.patch_size)
    end = config.num_prefix + grid[0] * grid[1]
    appended = intervention.appended if intervention is not None else 0
    registers = [*range(int(config.use_cls), config.num_prefix), *range(end, end + appended)]
    patches = slice(config.num_prefix, end)
    return StackRun(sown["intermediates"]["blocks"], patches, registers, grid)


def measure_blocks(
    sown: Mapping[str, Any], patches: slice, registers: Sequence[int], grid: tuple[int, int]
) -> TokenMeasures:
    """Measures the tokens of a scanned stack, one block after the other; see `StackRun`."""
    outputs, (q, k) = sown["block_out"][0], sown["attn"]["qk"][0]
    extra = k.shape[2] - outputs.shape[2]
    columns = np.asarray(registers, np.int32) + extra

    def measure(block: tuple[Array, Array, Array]) -> TokenMeasures:
        tokens = block[0][:, patches].astype(jnp.float32)
        received = received_attention(block[1], block[2])
        return TokenMeasures(
            norms=jnp.linalg.norm(tokens, axis=-1),
            cosine=neighbor_cosine(tokens, grid),
            rank=effective_rank(tokens),
            received=received[:, extra:][:, patches],
            to_registers=jnp.sum(received[:, columns], axis=-1),
        )

    return jax.lax.map(measure, (outputs, q, k))


def received_attention(q: Array, k: Array, max_weights: int = MAX_WEIGHTS) -> Array:
    """Returns the attention that each key receives, the mean over heads and queries [B, M].

    Args:
      q: Queries [B, S, H, K], not scaled.
      k: Keys [B, M, H, K].
      max_weights: Bound on the weights in memory; queries are taken in groups.
    """
    batch, length, heads, channels = q.shape
    rows = min(length, max(1, max_weights // (batch * heads * k.shape[1])))
    groups = -(-length // rows)
    padded = jnp.pad(q, ((0, 0), (0, groups * rows - length), (0, 0), (0, 0)))
    grouped = padded.reshape(batch, groups, rows, heads, channels).swapaxes(0, 1)
    counted = (jnp.arange(groups * rows) < length).reshape(groups, rows)

    def add(total: Array, group: tuple[Array, Array]) -> tuple[Array, None]:
        weights = attention_weights(group[0], k)
        return total + jnp.einsum("bhsm,s->bm", weights, group[1].astype(jnp.float32)), None

    zeros = jnp.zeros((batch, k.shape[1]), jnp.float32)
    total, _ = jax.lax.scan(add, zeros, (grouped, counted))
    return total / (heads * length)


def attention_weights(q: Array, k: Array) -> Array:
    """Returns the softmax weights [B, H, S, M] of queries [B, S, H, K] on keys [B, M, H, K]."""
    q, k = (x.astype(jnp.float32) for x in (q, k))
    scores = jnp.einsum(
        "bshk,bmhk->bhsm", q * q.shape[-1] ** -0.5, k, precision=jax.lax.Precision.HIGHEST
    )
    return jax.nn.softmax(scores, axis=-1)


def neighbor_cosine(tokens: Array, grid: tuple[int, int]) -> Array:
    """Returns the mean cosine similarity of each token to its neighbors in the grid [B, T].

    Tokens that carry local content resemble those around them; outliers do not. A grid of a single
    token gives 0.

    Args:
      tokens: [B, T, D].
      grid: Rows and columns.
    """
    length = jnp.linalg.norm(tokens, axis=-1, keepdims=True)
    unit = (tokens / jnp.maximum(length, 1e-30)).reshape(len(tokens), *grid, tokens.shape[-1])

    def around(x: Array) -> Array:
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        vertical = padded[:, :-2, 1:-1] + padded[:, 2:, 1:-1]
        return vertical + padded[:, 1:-1, :-2] + padded[:, 1:-1, 2:]

    count = jnp.maximum(around(jnp.ones((1, *grid, 1))), 1)[..., 0]
    return (jnp.sum(unit * around(unit), axis=-1) / count).reshape(tokens.shape[:2])


def effective_rank(tokens: Array) -> Array:
    """Returns the effective rank of each image's centered tokens [B, T, D], as [B].

    It is (sum of eigenvalues)^2 / sum of squared eigenvalues of their covariance, the exponential
    of the eigenvalues' Renyi entropy of order 2: n for n equal eigenvalues, and it needs no
    eigendecomposition. Equal tokens give 0.

    Source: Roy and Vetterli 2007, "The effective rank", with order 2 in place of 1.
    """
    centered = tokens - jnp.mean(tokens, axis=1, keepdims=True)
    total = jnp.sum(centered**2, axis=(1, 2), keepdims=True)
    centered = centered / jnp.sqrt(jnp.maximum(total, 1e-30))
    # The smaller of the two Gram matrices, which have the same eigenvalues.
    product = "btd,bsd->bts" if tokens.shape[1] <= tokens.shape[2] else "btd,bte->bde"
    gram = jnp.einsum(product, centered, centered, precision=jax.lax.Precision.HIGHEST)
    squares = jnp.sum(gram**2, axis=(1, 2))
    return jnp.where(squares > 0, 1 / jnp.maximum(squares, 1e-30), 0.0)


def summarize(measures: TokenMeasures, threshold: float | None = None) -> dict[str, np.ndarray]:
    """Returns statistics by block [L] under the names of `STATISTICS`, and "threshold".

    Args:
      measures: Measures of a batch, NumPy arrays.
      threshold: Norm above which patch tokens are outliers; None splits the norms after each block
        into two populations (`outliers.split_norms`). A block without a second one has the
        threshold NaN and no outliers.
    """
    norms = np.asarray(measures.norms, np.float64)
    flat = norms.reshape(len(norms), -1)
    limits = outlier_thresholds(norms, threshold)
    outliers = outlier_mask(norms, limits)
    p50, p98, p999, largest = np.quantile(flat, (0.5, 0.98, 0.999, 1.0), axis=1)
    received = np.asarray(measures.received, np.float64)
    return {
        "threshold": limits,
        "norm_p50": p50,
        "norm_p98": p98,
        "norm_p999": p999,
        "norm_max": largest,
        "norm_kurtosis": kurtosis(flat),
        "outlier_share": outliers.mean(axis=(1, 2)),
        "outlier_attention": (received * outliers).sum(axis=2).mean(axis=1),
        "register_attention": np.asarray(measures.to_registers, np.float64).mean(axis=1),
        "effective_rank": np.asarray(measures.rank, np.float64).mean(axis=1),
        "neighbor_cosine": np.asarray(measures.cosine, np.float64).mean(axis=(1, 2)),
    }


def outlier_thresholds(norms: np.ndarray, threshold: float | None = None) -> np.ndarray:
    """Returns the norm above which tokens are outliers, by block [L]; NaN where there are none.

    Args:
      norms: Norms [L, B, T].
      threshold: Norm for all blocks; None splits each block's norms.
    """
    if threshold is not None:
        return np.full(len(norms), float(threshold))
    found = (split_norms(each).threshold for each in norms)
    return np.array([np.nan if each is None else each for each in found])


def outlier_mask(norms: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Marks the outliers among norms [L, B, T], given a threshold per block [L]."""
    return norms > np.where(np.isnan(thresholds), np.inf, thresholds)[:, None, None]


def kurtosis(values: np.ndarray) -> np.ndarray:
    """Returns the kurtosis (fourth moment over squared variance) along the last axis.

    NaN where all values are equal.
    """
    centered = values - values.mean(axis=-1, keepdims=True)
    variance = np.mean(centered**2, axis=-1)
    return np.where(variance > 0, np.mean(centered**4, axis=-1) / variance**2, np.nan)
