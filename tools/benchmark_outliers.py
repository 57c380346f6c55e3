"""Times outlier statistics beside the training step, and prints what config.log.outliers costs.

    python tools/benchmark_outliers.py --config=configs/digits.py [--repeats 5]

Any key of the config can be set, as in --config.log.outlier_images=16. The overhead of statistics
every N steps is their time over that of N steps; pictures and metrics are included, compilation is
not.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from dsr_jax import build, train
from dsr_jax import config as configs
from dsr_jax.core.cli import make_parser, positive_int, run_main

INTERVALS = (50, 100, 500, 1_000)
LIMIT = 0.03


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line `argv` (default: the process's)."""
    parser = make_parser(__doc__)
    parser.add_argument("--config", required=True, help="config file with its arguments")
    parser.add_argument("--repeats", type=positive_int, default=5, help="timed calls of each")
    args, overrides = parser.parse_known_args(argv)
    unscored = ("--config.sample.every_steps=0", "--config.eval.classifier=")
    config = configs.load(args.config, [*unscored, *overrides, "--config.log.outliers=1"])
    build.set_precision(config)
    with tempfile.TemporaryDirectory() as folder:
        step, measure = measure_times(config, Path(folder), args.repeats)
    device = jax.devices()[0]
    images, levels = config.log.outlier_images, len(config.log.outlier_times)
    print(f"{args.config} on {jax.device_count()} x {device.device_kind}")
    print(f"training step of {config.data.global_batch} images: {1e3 * step:.1f} ms")
    print(f"statistics of {images} images at {levels} noise levels: {1e3 * measure:.1f} ms")
    for interval in INTERVALS:
        print(f"every {interval:>5,} steps: {measure / (interval * step):.2%}")
    print(f"below {LIMIT:.0%} from every {int(measure / (LIMIT * step)) + 1:,} steps on")


def measure_times(config: configs.ConfigDict, folder: Path, repeats: int) -> tuple[float, float]:
    """Returns the median seconds of a training step and of the statistics."""
    job = train.make_job(config, folder)
    monitor = job.hooks[-1].call
    batches = job.batches(0)
    state, batch = job.init(), next(batches)
    done = 0

    def step() -> None:
        nonlocal state, done
        state, metrics = job.step(state, batch)
        jax.block_until_ready((state, metrics))
        done += 1

    def measure() -> Any:
        return monitor(done, state)

    return _median(step, repeats), _median(measure, repeats)


def _median(call: Callable[[], Any], repeats: int) -> float:
    call()  # Compiles.
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


if __name__ == "__main__":
    run_main(main)
