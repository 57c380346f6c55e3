"""Finds the hidden MLP units that cause a ViT's outlier tokens, in one or more rounds.

A round detects outlier tokens, scores every unit by its activation on them, and selects the units
with the highest scores. The next round repeats this with those units moved to a test-time register,
and so finds the units behind the remaining outliers.

Source: DSR ttreg find_register_neurons, get_register_neurons; spec encoder 6.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dsr_jax.core.errors import ConfigError, DataError
from dsr_jax.core.typing import Array, Params
from dsr_jax.models.intervention import Intervention
from dsr_jax.models.vit import ViT
from dsr_jax.registers.neurons import Neurons, neurons_to_mask
from dsr_jax.registers.outliers import split_norms
from dsr_jax.registers.scoring import (
    Criterion,
    ScoreTable,
    Sparsity,
    outlier_mask,
    rank_neurons,
    score_images,
    token_norms,
)
from dsr_jax.registers.streaming import Images, ImageStream
from dsr_jax.registers.trace import Trace, trace_encoder

_QUANTILES = (0.5, 0.9, 0.99, 0.999, 1.0)


class NoOutliersError(DataError):
    """No token of any image is an outlier, so there is nothing to score."""


@dataclass(frozen=True)
class SearchSettings:
    """Settings of a search. Of values per round the last one applies to all later rounds.

    Attributes:
      threshold: Norm above which a token is an outlier; None splits the norms into two populations
        in each round.
      detect_block: Block after which norms are taken, counted as Python does (-1: the last).
      lowest_block: First block whose units may be selected.
      highest_block: Last such block of each round; -1 is the last of all.
      top_k: Number of units to select in each round.
      rounds: Number of rounds; None for as many as there are outliers.
      sparsity: Filter of units that are active nearly everywhere, or None.
      mean_token: Adds the mean token as a row (`scoring.Criterion`); None: if the encoder has no
        class token.
      num_registers: Test-time registers in later rounds.
      exclude_registers: Registers do not count as outliers in later rounds. By default they do, as
        in the original, which then finds the units of earlier rounds again.
      exclude_found: Units of earlier rounds are not selected again.
      as_released: Later rounds append no register and overwrite the last patch instead, as the
        released code does.  DSR-compat: spec encoder 14.2.
    """

    threshold: float | None = None
    detect_block: int = -1
    lowest_block: int = 0
    highest_block: Sequence[int] = (-1,)
    top_k: Sequence[int] = (50,)
    rounds: int | None = None
    sparsity: Sparsity | None = None
    mean_token: bool | None = None
    num_registers: int = 1
    exclude_registers: bool = False
    exclude_found: bool = False
    as_released: bool = False


@dataclass(frozen=True)
class Round:
    """One round of the search; N images of T patches each.

    Attributes:
      threshold: Norm above which a token was an outlier.
      norms: Patch norms at the detection block before the round's units were found [N, T].
      norms_after: The same with all units found so far moved to registers [N, T].
      cosine: Between each patch's final token without any intervention and after this round [N, T].
      scores: Mean score of every unit [L, M].
      counted: Images that had outliers.
      chosen: The units of this round.
    """

    threshold: float
    norms: np.ndarray
    norms_after: np.ndarray
    cosine: np.ndarray
    scores: np.ndarray
    counted: int
    chosen: Neurons


@dataclass(frozen=True)
class SearchResult:
    """Result of a search.

    Attributes:
      rounds: Rounds, in order.
      ended: Reason why the search ended.
    """

    rounds: list[Round]
    ended: str

    @property
    def neurons(self) -> Neurons:
        """The units of all rounds (`merge_neurons`)."""
        return merge_neurons([found.chosen for found in self.rounds])


def merge_neurons(rounds: Sequence[Neurons]) -> Neurons:
    """Concatenates the lists of several rounds block by block, as the published sets are.

    A unit found in two rounds is listed twice, which does not change the intervention.
    """
    if len(rounds) == 1:
        return dict(rounds[0])
    blocks = sorted({block for chosen in rounds for block in chosen})
    return {block: [u for chosen in rounds for u in chosen.get(block, [])] for block in blocks}


def choose_neurons(
    scores: np.ndarray,
    top_k: int,
    *,
    lowest_block: int = 0,
    highest_block: int = -1,
    exclude: Neurons | None = None,
) -> Neurons:
    """Returns the `top_k` units with the highest scores [L, M] by block, highest score first."""
    highest = len(scores) - 1 if highest_block == -1 else highest_block
    known = {(block, unit) for block, units in (exclude or {}).items() for unit in units}
    ranked = (pair for pair in rank_neurons(scores) if lowest_block <= pair[0] <= highest)
    chosen: Neurons = {}
    for block, unit in [pair for pair in ranked if pair not in known][:top_k]:
        chosen.setdefault(block, []).append(unit)
    return chosen


def find_registers(
    model: ViT,
    params: Params,
    images: Images,
    settings: SearchSettings,
    mesh: Mesh,
    *,
    batch: int = 8,
    log: Callable[[str], None] = print,
) -> SearchResult:
    """Searches an encoder for register neurons.

    At most one batch of activations is in memory. Only token norms and the [L, M] table of summed
    scores are kept.

    Args:
      model: The encoder.
      params: Parameters of the network.
      images: Normalized images.
      settings: See `SearchSettings`.
      mesh: Devices; batches are split over them.
      batch: Images at a time over all devices.
      log: Function that receives lines about progress.

    Raises:
      NoOutliersError: If no token of any image is an outlier, with the quantiles of the norms.
      ConfigError: If a block or count of the settings does not fit the encoder.
    """
    _check(settings, model)
    search = _Search(model, params, ImageStream(images, batch, mesh, log), settings)
    rounds: list[Round] = []
    while True:
        found = search.round(rounds)
        rounds.append(found)
        units = sum(len(chosen) for chosen in found.chosen.values())
        log(f"round {len(rounds)}: {units} units, {found.counted} images with outliers")
        if ended := search.reason_to_end(rounds):
            log(f"search ended: {ended}")
            return SearchResult(rounds, ended)


class _Search:
    """The compiled passes over the images, and the selection between them."""

    def __init__(
        self, model: ViT, params: Params, stream: ImageStream, settings: SearchSettings
    ) -> None:
        self._model = model
        self._stream = stream
        self._settings = settings
        self._params = stream.place(params)
        self._prefix = model.config.num_prefix
        self._mean_token = self._prefix == 0 if settings.mean_token is None else settings.mean_token
        self._score_batch = jax.jit(self._score_traced)
        self._compare_batch = jax.jit(self._compare_traced)
        self._norms_batch = jax.jit(self._norms_traced)
        # The intervention skips row 0. Without a class token that is the first patch, whose
        # outliers no round can remove.
        self._spared = int(self._prefix == 0)

    def round(self, earlier: Sequence[Round]) -> Round:
        """Runs one more round, on top of the `earlier` ones."""
        number, settings = len(earlier), self._settings
        found = merge_neurons([done.chosen for done in earlier])
        threshold = self._threshold(earlier)
        name = f"round {number + 1}"
        table, norms = self._score(found, threshold, f"{name}, scores")
        if not table.counted:
            raise no_outliers(norms, threshold)
        chosen = choose_neurons(
            table.mean,
            _of_round(settings.top_k, number),
            lowest_block=settings.lowest_block,
            highest_block=_of_round(settings.highest_block, number),
            exclude=found if settings.exclude_found else None,
        )
        merged = merge_neurons([*(done.chosen for done in earlier), chosen])
        after, cosine = self._compare(merged, f"{name}, effect")
        return Round(threshold, norms, after, cosine, table.mean, table.counted, chosen)

    def reason_to_end(self, rounds: Sequence[Round]) -> str:
        """Returns why the search ends; empty if another round follows."""
        if self._settings.rounds is not None:
            done = len(rounds) >= self._settings.rounds
            return f"{len(rounds)} rounds were asked for" if done else ""
        last, earlier = rounds[-1], merge_neurons([done.chosen for done in rounds[:-1]])
        if self._left(last) is None:
            return "no second population of norms is left"
        if all(unit in earlier.get(b, ()) for b, units in last.chosen.items() for unit in units):
            return (
                "outliers remain, but the last round found no new unit; "
                "consider exclude_registers and exclude_found"
            )
        return ""

    def _left(self, last: Round) -> float | None:
        """Returns the threshold if outliers above it are left after a round, else None."""
        norms = last.norms_after[:, self._spared :]
        if self._settings.threshold is not None:
            return self._settings.threshold if (norms > self._settings.threshold).any() else None
        return split_norms(norms).threshold

    def _threshold(self, earlier: Sequence[Round]) -> float:
        """Returns the norm above which tokens are outliers in the next round."""
        if self._settings.threshold is not None:
            return self._settings.threshold
        if earlier:
            left = self._left(earlier[-1])
            return earlier[-1].threshold if left is None else left
        parts = self._stream.map(self._norms_batch, self._params, "norms")
        norms = np.concatenate(list(parts))
        split = split_norms(norms)
        if split.threshold is None:
            raise no_outliers(norms, None)
        return split.threshold

    def _score(self, found: Neurons, threshold: float, what: str) -> tuple[ScoreTable, np.ndarray]:
        """Scores over all images with `found` moved to registers, and the patches' norms."""
        table = ScoreTable(self._model.config.depth, self._model.config.mlp_dim)
        norms = []
        function = functools.partial(
            self._score_batch,
            intervention=self._intervention(found),
            threshold=jnp.float32(threshold),
        )
        for part in self._stream.map(function, self._params, what):
            table.add(part["scores"], part["outliers"])
            norms.append(part["norms"])
        return table, np.concatenate(norms)

    def _compare(self, neurons: Neurons, what: str) -> tuple[np.ndarray, np.ndarray]:
        """Norms [N, T] with the intervention, cosines [N, T] of final tokens without and with."""
        function = functools.partial(self._compare_batch, intervention=self._intervention(neurons))
        parts = list(self._stream.map(function, self._params, what))
        norms, cosine = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
        return norms, cosine

    def _score_traced(
        self, params: Params, pixels: Array, intervention: Intervention | None, threshold: Array
    ) -> dict[str, Array]:
        """Scores [B, L, M], outlier rows and patch norms [B, T] of one batch."""
        trace = trace_encoder(self._model, params, pixels, intervention)
        outputs = trace.outputs[self._settings.detect_block]
        criterion = Criterion(
            threshold,
            mean_token=self._mean_token,
            num_prefix=self._prefix,
            num_suffix=self._num_suffix(intervention),
            sparsity=self._settings.sparsity,
        )
        norms = token_norms(outputs, self._mean_token)
        outliers = outlier_mask(norms, criterion)
        return {
            "scores": score_images(trace.activations, outliers, criterion),
            "outliers": outliers,
            "norms": self._patch_norms(trace),
        }

    def _compare_traced(
        self, params: Params, pixels: Array, intervention: Intervention | None
    ) -> tuple[Array, Array]:
        plain = trace_encoder(self._model, params, pixels, None).tokens
        trace = trace_encoder(self._model, params, pixels, intervention)
        return self._patch_norms(trace), _cosine(plain, trace.tokens)

    def _norms_traced(self, params: Params, pixels: Array) -> Array:
        return self._patch_norms(trace_encoder(self._model, params, pixels, None))

    def _patch_norms(self, trace: Trace) -> Array:
        """Norms [B, T] of the patches at the detection block."""
        outputs = trace.outputs[self._settings.detect_block]
        num_patches = trace.tokens.shape[1]
        return token_norms(outputs[:, self._prefix : self._prefix + num_patches], False)

    def _num_suffix(self, intervention: Intervention | None) -> int:
        """Returns the number of registers after the patches that do not count as outliers."""
        appended = intervention is not None and not self._settings.as_released
        return self._settings.num_registers * (appended and self._settings.exclude_registers)

    def _intervention(self, neurons: Neurons) -> Intervention | None:
        """Returns the intervention of a round; None before neurons were found."""
        if not neurons:
            return None
        config = self._model.config
        return self._stream.place(
            Intervention(
                mask=neurons_to_mask(neurons, config.depth, config.mlp_dim),
                num_registers=self._settings.num_registers,
                append=not self._settings.as_released,
            )
        )


def no_outliers(norms: np.ndarray, threshold: float | None) -> NoOutliersError:
    """Returns an error with the quantiles of the norms [N, T] and a threshold to try."""
    quantiles = ", ".join(f"{q:g}: {np.quantile(norms, q):.4g}" for q in _QUANTILES)
    split = split_norms(norms).threshold
    if split is not None:
        advice = f"the norms have two populations, above and below {split:.4g}: use that threshold"
    else:
        advice = (
            "the norms are one population, so this encoder seems to have no outlier tokens on "
            f"these images; to look at the largest anyway, use {np.quantile(norms, 0.99):.4g}"
        )
    above = "is an outlier" if threshold is None else f"has a norm above {threshold:g}"
    return NoOutliersError(
        f"no token of {len(norms)} images {above}; quantiles of the norms: {quantiles}", advice
    )


def _check(settings: SearchSettings, model: ViT) -> None:
    """Raises ConfigError if blocks or counts do not fit the encoder."""
    depth, units = model.config.depth, model.config.mlp_dim
    if not -depth <= settings.detect_block < depth:
        raise ConfigError(
            f"detect_block={settings.detect_block}, but the encoder has {depth} blocks",
            f"use {-depth} to {depth - 1}",
        )
    for highest in settings.highest_block:
        if highest != -1 and not settings.lowest_block <= highest < depth:
            raise ConfigError(
                f"blocks {settings.lowest_block} to {highest}, but the encoder has {depth} blocks",
                f"use 0 to {depth - 1}, or -1 for no limit",
            )
    for count in settings.top_k:
        if not 1 <= count <= depth * units:
            raise ConfigError(
                f"top_k={count}, but the encoder has {depth * units} units", "use 1 or more"
            )


def _of_round(values: Sequence[int], number: int) -> int:
    return values[min(number, len(values) - 1)]


def _cosine(a: Array, b: Array) -> Array:
    """Returns the cosine similarity of vectors [..., D]."""
    norms = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
    return jnp.sum(a * b, axis=-1) / jnp.maximum(norms, 1e-12)
