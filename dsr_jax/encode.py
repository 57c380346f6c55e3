"""Runs the encoder over a data set: `python -m dsr_jax.encode statistics --config=... --out=DIR`.

Takes mean and variance of the latents, by channel and position, in one pass over the images that
the config names, each once and, as in the original, half of them mirrored. Any key of the config
can be set behind it, as in `--config.data.root=imagenet/train`; `--config.space.statistics=DIR`
then makes a training run use the result. The same command continues a pass that was stopped, and
ends with the same bits as one that was not. On several hosts DIR must be one that all of them see.
"""

import argparse
import io
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from dsr_jax import build
from dsr_jax import config as configs
from dsr_jax.build_rae import file_digests
from dsr_jax.convert.statistics import FILE, save_statistics
from dsr_jax.core.cli import run_main
from dsr_jax.core.errors import ConfigError
from dsr_jax.core.files import write_atomic, write_json
from dsr_jax.core.provenance import provenance
from dsr_jax.core.typing import Array, Batch, PyTree
from dsr_jax.parallel import shardings
from dsr_jax.parallel.processes import is_primary, say, start_processes
from dsr_jax.spaces.statistics import LatentStatistics
from dsr_jax.telemetry.clock import StepClock
from dsr_jax.telemetry.progress import Progress

_PROGRESS, _RECORD = "progress.npz", "statistics.json"
_ENCODING = (
    *("encoder", "image_size", "preln", "neurons", "num_registers", "register_scale"),
    *("normal_values", "shared_maximum", "spare_first_token"),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line `argv` (default: the process's)."""
    args, overrides = _parser().parse_known_args(argv)
    # Grain's worker processes read absl's flags, which this program does not use.
    flags.FLAGS(sys.argv[:1], known_only=True)
    config = load_config(args, overrides)
    start_processes()
    build.set_precision(config)
    statistics_of(config, Path(args.out), args.images, args.save_every, args.stop_after)


def load_config(args: argparse.Namespace, overrides: Sequence[str]) -> configs.ConfigDict:
    """Returns the config of what is to be encoded, without normalisation, decoder and noise.

    Raises:
      ConfigError: If keys or values cannot be, or the space has no encoder.
    """
    config = configs.load_file(args.config)
    configs.apply_overrides(config, overrides)
    config.data.update(global_batch=args.batch, flip=args.flip)
    config.optim.accumulate = 1
    # What is to be measured are the latents themselves.
    config.space.update(statistics="", decoder="")
    configs.check(config)
    if config.space.name != "rae":
        raise ConfigError(
            f"config.space.name={config.space.name!r} has no encoder",
            "set --config.space.name=rae and --config.space.encoder=FOLDER",
        )
    return config


def statistics_of(
    config: configs.ConfigDict, out: Path, images: int, save_every: int, stop_after: int = 0
) -> None:
    """Takes the statistics and writes them, and what they are of, into the folder `out`.

    Args:
      config: Data and space.
      out: A new folder, or that of the same pass.
      images: How many to take, in the order of training; 0 for each image once.
      save_every: Batches between two savings of the sums.
      stop_after: Batches after which to stop, as if interrupted; 0 for none.

    Raises:
      ConfigError: If the folder holds statistics of something else.
    """
    mesh, rules = build.make_mesh(config), build.make_rules(config)
    space, variables = build.make_space(config, mesh)
    source = build.make_source(config)
    count = images or len(source)
    recipe = make_recipe(config, source.name, count)
    statistics, start = restore(out, recipe, space.latent_shape)
    steps = -(-count // config.data.global_batch)
    if start == steps and (out / FILE).exists():
        say(f"complete: {out / FILE}")
        return
    sharding = shardings.batch_sharding(mesh, rules)
    waiting = Waiting(build.global_batches(config, source, sharding)(start))
    encode = jax.jit(lambda given, pixels: space.encode(given, pixels.astype(np.float32) / 255))
    begin, stop = time.monotonic(), min(steps, start + stop_after if stop_after else steps)

    def keep(step: int, latents: np.ndarray) -> None:
        first = step * config.data.global_batch
        statistics.add(latents[: count - first])
        if (step + 1) % save_every == 0 or step + 1 == stop:
            save(out, recipe, statistics, step + 1)

    _run(encode, variables, waiting, keep, range(start, stop), config.data.global_batch, steps)
    share = waiting.seconds / max(time.monotonic() - begin, 1e-9)
    say(f"{statistics.count} images; {share:.1%} of the time was spent waiting for data")
    if stop == steps and is_primary():
        save_statistics(out / FILE, statistics.finish())
        details = {"images": statistics.count, "data_wait_share": round(share, 4)}
        write_json(out / _RECORD, {"recipe": recipe, **details, "provenance": provenance()})
        say(f"statistics: {out / FILE}; use them with --config.space.statistics={out}")


class Waiting:
    """An iterator that knows how long its caller has waited for it.

    Args:
      batches: What it yields.

    Attributes:
      seconds: Time spent in `batches` so far.
    """

    def __init__(self, batches: Iterator[Batch]) -> None:
        self._batches = batches
        self.seconds = 0.0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        start = time.monotonic()
        try:
            return next(self._batches)
        finally:
            self.seconds += time.monotonic() - start


def _run(
    encode: Callable[[PyTree, Array], Array],
    variables: PyTree,
    batches: Iterator[Batch],
    keep: Callable[[int, np.ndarray], None],
    steps: range,
    batch: int,
    total: int,
) -> None:
    """Encodes a batch per step; the host adds up one batch while the devices encode the next."""
    clock = StepClock(batch, total)
    with Progress(total, start_step=steps.start) as progress:
        pending = encode(variables, next(batches)["image"]) if steps else None
        for step in steps:
            current = pending
            if step + 1 in steps:
                pending = encode(variables, next(batches)["image"])
            keep(step, shardings.fetch(current))
            progress.update(step + 1, timing=clock.lap(step + 1))


def make_recipe(config: configs.ConfigDict, source: str, count: int) -> dict[str, Any]:
    """What decides the statistics to the bit, as JSON values."""
    data = {key: config.data[key] for key in ("split", "image_size", "global_batch", "flip")}
    space = {f"config.space.{key}": config.space[key] for key in _ENCODING}
    recipe = {
        "data": {"source": source, "images": count, "seed": config.seed, **data},
        "space": space | file_digests(config),
        "precision": config.precision.to_dict(),
    }
    return json.loads(json.dumps(recipe))


def save(out: Path, recipe: dict[str, Any], statistics: LatentStatistics, step: int) -> None:
    """Writes the sums over the batches before `step`, on the primary process."""
    if is_primary():
        buffer = io.BytesIO()
        arrays: dict[str, Any] = {"recipe": json.dumps(recipe), "step": step, **statistics.state()}
        np.savez(buffer, **arrays)
        write_atomic(out / _PROGRESS, buffer.getvalue())


def restore(
    out: Path, recipe: dict[str, Any], shape: tuple[int, int, int]
) -> tuple[LatentStatistics, int]:
    """Reads the sums of a pass that was stopped, and the batch to go on with.

    Raises:
      ConfigError: If the folder holds something else, or a pass of other settings.
    """
    path = out / _PROGRESS
    if not path.exists():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ConfigError(f"{out} holds other files", "name a new folder; nothing was written")
        return LatentStatistics.empty(shape), 0
    with np.load(path, allow_pickle=False) as state:
        found = json.loads(str(state["recipe"]))
        if found != recipe:
            differing = [
                f"{section}.{key}: {found[section].get(key)} -> {value}"
                for section, values in recipe.items()
                for key, value in values.items()
                if found[section].get(key) != value
            ]
            raise ConfigError(
                f"{out} holds statistics of other settings:\n    " + "\n    ".join(differing[:8]),
                "name another --out, or use the settings that it was started with",
            )
        return LatentStatistics.from_state(state), int(state["step"])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dsr_jax.encode",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_subparsers(required=True, metavar="WHAT")
    add = what.add_parser("statistics", help="mean and variance of the latents").add_argument
    add("--config", required=True, help="config file that names data and space")
    add("--out", required=True, help="folder of the result, new or of the same pass")
    add("--batch", type=int, default=256, help="images at a time over all devices")
    add("--images", type=int, default=0, help="how many; default: each image once")
    add(
        "--flip",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="mirror half of the images, as the original does",
    )
    add("--save-every", type=int, default=100, help="batches between two savings")
    add("--stop-after", type=int, default=0, help="stop after so many batches; 0: run to the end")
    return parser


if __name__ == "__main__":
    run_main(main)
