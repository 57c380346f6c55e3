"""Measures networks for the report on their outlier tokens: maps, statistics and samples."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsr_jax import build
from dsr_jax.build.from_run import load_denoiser
from dsr_jax.config import ConfigDict
from dsr_jax.core.errors import ConfigError, DsrError
from dsr_jax.core.typing import Array, Batch, Params, PyTree
from dsr_jax.data.base import Source
from dsr_jax.models.denoiser import Denoiser
from dsr_jax.models.intervention import Intervention
from dsr_jax.models.text_to_image import TextToImage
from dsr_jax.models.vit import ViT, ViTConfig
from dsr_jax.parallel.axes import Constrain
from dsr_jax.parallel.mesh import MeshShape, make_mesh
from dsr_jax.parallel.shardings import fetch
from dsr_jax.registers.maps import TokenMaps, map_blocks, principal_colors
from dsr_jax.registers.statistics import (
    TokenMeasures,
    measure_blocks,
    run_denoiser,
    run_encoder,
    summarize,
)
from dsr_jax.reports.outlier_page import Variant
from dsr_jax.runs.outliers import noised_latents
from dsr_jax.sampling.images import image_grid
from dsr_jax.sampling.labels import cycled_labels
from dsr_jax.spaces import InputSpace

GRID_COLUMNS = 4


class Found(NamedTuple):
    """Measures of a network at one noise level.

    Attributes:
      measures: Measures of all blocks.
      maps: Maps by stack, whose tokens may differ in width.
    """

    measures: TokenMeasures
    maps: list[TokenMaps]


@dataclass
class Inspected:
    """A network and what was found at each noise level.

    Attributes:
      name: Its name in the report.
      grid: Patches from top to bottom and from left to right.
      found: By noise level.
      notes: Lines about its origin.
      samples: Picture of samples; None if there are none.
    """

    name: str
    grid: tuple[int, int]
    found: list[Found]
    notes: list[str]
    samples: np.ndarray | None = field(default=None)


def read_images(source: Source, count: int) -> dict[str, np.ndarray]:
    """Returns `count` records, evenly over a source: "image", "index" and "label", of captions
    "tokens" in place of the label."""
    rows = np.unique(np.linspace(0, len(source) - 1, count).round().astype(int))
    records = [source[int(row)] for row in rows]
    batch: dict[str, np.ndarray] = {
        "image": np.stack([record["image"] for record in records]),
        "index": rows.astype(np.uint32),
    }
    if "tokens" in records[0]:
        return {**batch, "tokens": np.stack([record["tokens"] for record in records])}
    labels = [record.get("label", 0) for record in records]
    return {**batch, "label": np.array(labels, np.int32)}


def inspect_denoiser(
    name: str,
    config: ConfigDict,
    model: Denoiser,
    params: Params,
    space: InputSpace,
    variables: PyTree,
    batch: Batch,
    times: Sequence[float],
    threshold: float | None = None,
) -> Inspected:
    """Measures a denoiser on noised images.

    Args:
      name: Name in the report.
      config: Its config.
      model: The network.
      params: Its parameters.
      space: Its input space.
      variables: The space's frozen arrays.
      batch: Result of `read_images`.
      times: Noise levels, 0 = data, 1 = noise.
      threshold: As of `statistics.summarize`; kept in the notes.
    """
    path = build.make_objective(config).path

    @jax.jit
    def measure(params: Params, variables: PyTree, batch: Batch, t: Array) -> Any:
        x, conditions = noised_latents(config.seed, path.interpolate, space, variables, batch, t)
        runs = run_denoiser(model, params, x, jnp.full(len(x), t), conditions)
        return [measure_blocks(*run) for run in runs], [map_blocks(run) for run in runs]

    found = []
    for time in times:
        parts, maps = fetch(measure(params, variables, dict(batch), jnp.float32(time)))
        measures = TokenMeasures(*map(np.concatenate, zip(*parts, strict=True)))
        found.append(Found(measures, maps))
    side = getattr(model, "grid", 0)
    notes = [f"{config.model.name}, {model.summary()}"]
    if threshold is not None:
        notes.append(f"outliers are tokens of a norm above {threshold:g}")
    return Inspected(name, (side, side), found, notes)


def inspect_encoder(
    name: str,
    config: ViTConfig,
    params: Params,
    pixels: np.ndarray,
    intervention: Intervention | None = None,
) -> Inspected:
    """Measures an encoder on normalized images [B, H, W, 3]."""
    model = ViT(config)

    @jax.jit
    def measure(params: Params, pixels: Array) -> Any:
        run = run_encoder(model, params, pixels, intervention)
        return measure_blocks(*run), map_blocks(run)

    measures, maps = fetch(measure(params, jnp.asarray(pixels)))
    grid = (pixels.shape[1] // config.patch_size, pixels.shape[2] // config.patch_size)
    registers = "no test-time registers"
    if intervention is not None:
        registers = f"{intervention.num_registers} test-time registers"
    notes = [
        f"{config.family}, {config.depth} blocks of width {config.hidden_size}, "
        f"{config.num_registers} trained registers, {registers}"
    ]
    return Inspected(name, grid, [Found(measures, [maps])], notes)


def draw_samples(
    config: ConfigDict,
    model: Denoiser,
    params: Params,
    space: InputSpace,
    variables: Any,
    count: int,
) -> np.ndarray | None:
    """Returns a grid of samples, uint8 [H, W, C]; None if the space cannot make images.

    Noise depends on config.sample.seed alone; labels, or of text the config's prompts, come in
    turn.
    """
    mesh, rules = make_mesh(MeshShape(data=1), jax.local_devices()[:1]), build.make_rules(config)
    try:
        sampler = build.make_sampler(config, model.clone(constrain=Constrain()), space, mesh, rules)
        if isinstance(model, TextToImage):
            prompts = list(itertools.islice(itertools.cycle(config.sample.prompts), count))
            conditions = build.encode_prompts(config, prompts, model.num_slots)
        else:
            conditions = cycled_labels(list(range(config.data.num_classes)), count)
        indices = np.arange(count, dtype=np.uint32)
        images = np.asarray(sampler(params, variables, indices, conditions).images)
    except DsrError:
        return None
    scale = max(1, -(-48 // images.shape[1]))
    grid = image_grid(images.repeat(scale, axis=1).repeat(scale, axis=2), GRID_COLUMNS, gap=2)
    return grid.repeat(3, axis=-1) if grid.shape[-1] == 1 else grid


def load_run(
    workdir: Path, step: int | None = None, ema: str | None = None
) -> tuple[ConfigDict, Denoiser, Params, InputSpace, PyTree, str]:
    """Reads a run's denoiser and its input space.

    Returns:
      Config, network, parameters, space, its variables, and a line about the weights.
    """
    model, params, record, config = load_denoiser(workdir, step, ema)
    space, variables = build.make_space(config)
    return config, model, params, space, variables, f"{record['source']}, {record['entry']}"


def load_converted(
    folder: Path, config: ConfigDict
) -> tuple[ConfigDict, Denoiser, Params, InputSpace, PyTree, str]:
    """Reads a converted denoiser; returns the same as `load_run`."""
    mesh, rules = make_mesh(MeshShape(data=1), jax.local_devices()[:1]), build.make_rules(config)
    space, variables = build.make_space(config)
    model = build.make_model(config, space, Constrain(rules, mesh))
    abstract = build.abstract_params(model, space, mesh, rules)
    params, record = build.restore_converted(str(folder), model, abstract)
    source = f"converted from {record['source']}"
    return config, model.clone(constrain=Constrain()), fetch(params), space, variables, source


def make_variants(inspected: Sequence[Inspected], threshold: float | None = None) -> list[Variant]:
    """Returns what the report shows; principal components have one basis for all networks.

    Args:
      inspected: Networks, measured at the same noise levels.
      threshold: As of `statistics.summarize`.

    Raises:
      ConfigError: If they were measured at different noise levels.
    """
    levels = {len(each.found) for each in inspected}
    if len(levels) > 1:
        raise ConfigError("networks were measured at different noise levels", "give all the same")
    colors = [_colors([each.found[i] for each in inspected]) for i in range(levels.pop())]
    variants = []
    for index, each in enumerate(inspected):
        found = each.found

        def stacked(take: Callable[[Found], np.ndarray], found: list[Found] = found) -> np.ndarray:
            return np.stack([take(level) for level in found])

        maps = {
            "norms": stacked(lambda level: level.measures.norms),
            "pca": np.stack([level[index] for level in colors]),
            "received": stacked(lambda level: level.measures.received),
            "strongest": stacked(lambda level: np.concatenate([m.strongest for m in level.maps])),
            "registers": stacked(lambda level: np.concatenate([m.registers for m in level.maps])),
            "cosine": stacked(lambda level: level.measures.cosine),
        }
        if np.isnan(maps["registers"]).all():
            del maps["registers"]
        maps = {k: np.nan_to_num(x) if k == "registers" else x for k, x in maps.items()}
        statistics = [summarize(level.measures, threshold) for level in found]
        variants.append(Variant(each.name, each.grid, maps, statistics, each.samples, each.notes))
    return variants


def _colors(found: Sequence[Found]) -> list[np.ndarray]:
    """Returns colors [L, B, T, 3] of each network at one noise level."""
    tokens = [[block for stack in each.maps for block in stack.tokens] for each in found]
    colors: list[list[np.ndarray]] = [[] for _ in found]
    for block in range(max(map(len, tokens))):
        here = [i for i, blocks in enumerate(tokens) if block < len(blocks)]
        shown = principal_colors([tokens[i][block] for i in here])
        for i, each in zip(here, shown, strict=True):
            colors[i].append(each)
    return [np.stack(blocks) for blocks in colors]
