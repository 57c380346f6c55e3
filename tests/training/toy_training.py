"""A tiny run for the tests of training: two dense layers on vectors drawn by step.

As a script it is a whole run, for tests that need processes of their own:

    python toy_training.py WORKDIR STEPS [--slow] [--save-every=N] [--step-seconds=S]
        [--long-compilation]

It writes the final parameters to WORKDIR/final.npz and prints `step N` after each step. With
TOY_FAULT=KIND:PROCESS:STEP something goes wrong in one process behind a step: "corrupt" changes its
copy of an array, "data" lets it wait for a batch for ever, "skip" gives it those of another step,
"raise" raises an error, "disk" that of a full disk, "nan" makes one of its samples no number, which
--skip-nonfinite skips.
"""

import argparse
import copy
import errno
import hashlib
import itertools
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dsr_jax.core.cli import run_main
from dsr_jax.core.errors import DataError
from dsr_jax.core.trees import flatten_names
from dsr_jax.diffusion.objectives import make_objective
from dsr_jax.diffusion.time_sampling import TimeSampler
from dsr_jax.parallel.axes import make_rules
from dsr_jax.parallel.mesh import MeshShape, make_mesh
from dsr_jax.parallel.processes import is_process_zero, start_processes
from dsr_jax.parallel.shardings import (
    batch_sharding,
    fetch,
    host_to_global,
    make_shardings,
    process_rows,
    replicated,
)
from dsr_jax.parallel.watch import Limits, Watch, join_watch
from dsr_jax.telemetry.clock import StepClock
from dsr_jax.telemetry.profiler import ProfileWindow
from dsr_jax.telemetry.progress import Progress
from dsr_jax.telemetry.writers import MetricWriter
from dsr_jax.training.checkpoints import Checkpoints
from dsr_jax.training.loop import (
    Instruments,
    LoopSettings,
    Summary,
    start_or_resume,
    train_loop,
)
from dsr_jax.training.optimizers import LearningRate, Optimizer
from dsr_jax.training.skipping import skip_batches
from dsr_jax.training.state import TrainState, create_state
from dsr_jax.training.step import TrainStep

BATCH, SIZE, CLASSES = 16, 4, 3
# Compiling, not computing, is what these tests wait for.
FAST_COMPILE = {"xla_backend_optimization_level": 0}


class Toy(nn.Module):
    """Predicts from x, t and the label; width is the only architecture there is."""

    width: int = 16

    @nn.compact
    def __call__(self, x: jax.Array, t: jax.Array, labels: jax.Array) -> jax.Array:
        init = nn.initializers.normal(0.3)
        w1 = self.param(
            "w1",
            nn.with_logical_partitioning(init, ("channels", "embed")),
            (SIZE * SIZE, self.width),
        )
        w2 = self.param(
            "w2",
            nn.with_logical_partitioning(init, ("embed", "channels")),
            (self.width, SIZE * SIZE),
        )
        table = self.param(
            "table",
            nn.with_logical_partitioning(init, ("classes", "embed")),
            (CLASSES + 1, self.width),
        )
        h = jnp.tanh(x.reshape(len(x), -1) @ w1 + table[labels] + t[:, None])
        return (h @ w2).reshape(x.shape)


def optimizer(**changes: Any) -> Optimizer:
    """AdamW with everything switched on."""
    rate = LearningRate(1e-2, "cosine", 1e-3, warmup_steps=3, decay_end_steps=20)
    return Optimizer(rate, **{"weight_decay": 0.01, "clip_norm": 1.0, **changes})


def encode_pixels(variables: Any, images: jax.Array, keys: jax.Array) -> jax.Array:
    """Maps [0, 1] to [-1, 1]."""
    return images * 2 - 1


def train_step(
    model: nn.Module = Toy(),  # noqa: B008
    tx: Optimizer | None = None,
    encode: Any = encode_pixels,
    **changes: Any,
) -> Any:
    """The uncompiled step."""
    return TrainStep(
        lambda p, *args: model.apply({"params": p}, *args),
        encode,
        make_objective("linear", "data"),
        TimeSampler("logit-normal", shift=2.0),
        tx or optimizer(),
        **{"seed": 7, "null_label": CLASSES, "label_dropout": 0.3, "num_time_bins": 4, **changes},
    )


def host_batch(step: int, rows: Any = slice(None)) -> dict[str, np.ndarray]:
    """The rows of the global batch of one step."""
    rng = np.random.default_rng(step)
    batch = {
        "image": rng.integers(0, 256, (BATCH, SIZE, SIZE, 1), np.uint8),
        "label": rng.integers(0, CLASSES, BATCH).astype(np.int32),
        "index": step * BATCH + np.arange(BATCH),
    }
    return {name: value[rows] for name, value in batch.items()}


class Run:
    """Everything that a start of the toy run builds."""

    def __init__(
        self,
        workdir: Path,
        mesh_shape: MeshShape = MeshShape(),  # noqa: B008
        model: nn.Module = Toy(),  # noqa: B008
        every_steps: int = 4,
        ema_decays: tuple[float, ...] = (0.9, 0.5),
        architecture: dict[str, Any] | None = None,
        devices: int | None = None,
        **changes: Any,
    ) -> None:
        self.workdir, self.every_steps = workdir, every_steps
        self.architecture = architecture or {"model.width": getattr(model, "width", 0)}
        rules = make_rules("fsdp")
        self.mesh = make_mesh(mesh_shape, jax.devices()[:devices])
        self.batch_sharding = batch_sharding(self.mesh, rules)
        tx = changes.pop("tx", None) or optimizer()
        skip = changes.pop("skip", None) or {"nonfinite": False}

        def init() -> TrainState:
            example = jnp.zeros((1, SIZE, SIZE, 1)), jnp.zeros(1), jnp.zeros(1, int)
            params = model.init(jax.random.key(0), *example)["params"]
            return create_state(params, tx, ema_decays)

        boxed = jax.eval_shape(init)
        self.shardings = make_shardings(boxed, rules, self.mesh)
        self.abstract = jax.tree.map(
            lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s),
            nn.unbox(boxed),
            self.shardings,
        )
        self.init = jax.jit(lambda: nn.unbox(init()), out_shardings=self.shardings)
        self.step = jax.jit(
            skip_batches(train_step(model, tx, **changes), **skip),
            in_shardings=(self.shardings, self.batch_sharding),
            out_shardings=(self.shardings, replicated(self.mesh)),
            donate_argnums=0,
            compiler_options=FAST_COMPILE,
        )

    def elsewhere(self, workdir: Path) -> "Run":
        """The same run in another folder, compiled already."""
        run = copy.copy(self)
        run.workdir = workdir
        return run

    def batch(self, step: int) -> dict[str, jax.Array]:
        """The global batch of one step."""
        rows = process_rows(self.batch_sharding, BATCH)
        return host_to_global(host_batch(step, rows), self.batch_sharding, BATCH)

    def float_batch(self, step: int, nan: bool = False) -> dict[str, jax.Array]:
        """The same with images of floats; the first of this process's rows may be no number."""
        rows = host_batch(step, process_rows(self.batch_sharding, BATCH))
        image = rows["image"].astype(np.float32) / 255
        image[:1] = np.nan if nan else image[:1]
        return host_to_global({**rows, "image": image}, self.batch_sharding, BATCH)

    def batches(self, start: int) -> Iterator[dict[str, jax.Array]]:
        """Batches from one step on."""
        while True:
            yield self.batch(start)
            start += 1

    def checkpoints(self, **changes: Any) -> Checkpoints:
        """Opens the run's checkpoints."""
        settings = {"every_steps": self.every_steps, "architecture": self.architecture, **changes}
        return Checkpoints(self.workdir / "checkpoints", **settings)

    def train(
        self, steps: int, *, step_fn: Any = None, log_every: int = 3, restore_step: int = -1,
        hooks: Any = (), stop_after_steps: int = 0, batches: Any = None, watch: Watch | None = None,
    ) -> Summary:  # fmt: skip
        """Starts or continues the run."""
        with self.checkpoints() as checkpoints:
            state, resume_state = start_or_resume(
                checkpoints, self.init, self.abstract, restore_step
            )
            with (
                MetricWriter(self.workdir, first_step=int(state.step) + 1) as writer,
                Progress(steps, start_step=int(state.step)) as progress,
                ProfileWindow(self.workdir, 0, 0) as profile,
            ):
                clock = StepClock(BATCH, steps)
                out = Instruments(
                    *(writer, progress, clock, profile),
                    watch=watch or Watch(),
                    records=lambda step: range((step - 1) * BATCH, step * BATCH),
                    failures=self.workdir / "failures",
                )
                return train_loop(
                    state,
                    step_fn or self.step,
                    batches or self.batches,
                    checkpoints,
                    LoopSettings(steps, log_every, stop_after_steps),
                    out,
                    hooks=hooks,
                    resume_state=resume_state,
                )


def flat(tree: Any) -> dict[str, np.ndarray]:
    """Whole arrays by name, on every host."""
    return {name: np.asarray(value) for name, value in flatten_names(fetch(tree)).items()}


def corrupt(state: TrainState) -> TrainState:
    """Changes one number in this process's copy of a parameter."""
    array = state.params["table"]
    pieces = [np.array(shard.data) for shard in array.addressable_shards]
    for piece in pieces:
        piece.flat[0] += 1
    placed = [
        jax.device_put(piece, shard.device)
        for piece, shard in zip(pieces, array.addressable_shards, strict=True)
    ]
    wrong = jax.make_array_from_single_device_arrays(array.shape, array.sharding, placed)
    return state.replace(params={**state.params, "table": wrong})


def main() -> int:
    """Runs as a script; see the module's docstring."""
    parser = argparse.ArgumentParser()
    parser.add_argument("workdir", type=Path)
    parser.add_argument("steps", type=int)
    parser.add_argument("--slow", action="store_true")
    parser.add_argument("--save-every", type=int, default=1000)
    parser.add_argument("--step-seconds", type=float, default=0.0)
    parser.add_argument("--long-compilation", action="store_true")
    parser.add_argument("--data-parallel", action="store_true")
    parser.add_argument("--skip-nonfinite", action="store_true")
    args = parser.parse_args()
    start_processes()
    with join_watch(args.workdir, Limits(args.step_seconds), True, lost_seconds=8.0) as watch:
        return run_script(args, watch)


def run_script(args: argparse.Namespace, watch: Watch) -> int:
    """Trains, with the fault that the environment asks for."""
    kind, process, at = os.environ.get("TOY_FAULT", "none:-1:-1").split(":")
    faulty = int(process) == jax.process_index()
    mesh = MeshShape(jax.device_count(), 1, 1) if args.data_parallel else MeshShape()
    skip = {"nonfinite": args.skip_nonfinite}
    run = Run(args.workdir, mesh, every_steps=args.save_every, skip=skip)

    def step_fn(state: TrainState, batch: Any) -> Any:
        if args.long_compilation:
            # C code that no signal interrupts, as the compiler's.
            hashlib.pbkdf2_hmac("sha256", b"", b"", 200_000_000)
        done = run.step(state, batch)
        step = int(done[0].step)
        print(f"step {step}", flush=True)
        time.sleep(0.05 if args.slow else 0)
        if faulty and step == int(at):
            if kind == "raise":
                raise DataError("no such file: shard-7", "mend it")
            if kind == "disk":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "picture.png")
            if kind == "corrupt":
                done = corrupt(done[0]), done[1]
        return done

    def batches(start: int) -> Iterator[Any]:
        for step in itertools.count(start):
            late = faulty and step >= int(at)
            if late and kind == "data":
                time.sleep(1000)
            if kind == "nan":
                yield run.float_batch(step, nan=faulty and step == int(at))
            else:
                yield run.batch(step + 1 if late and kind == "skip" else step)

    summary = run.train(args.steps, step_fn=step_fn, batches=batches, watch=watch)
    final = flat(summary.state)
    if is_process_zero():
        np.savez(args.workdir / "final.npz", **final)
    return summary.exit_status


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    jax.config.update("jax_num_cpu_devices", int(os.environ.get("TOY_DEVICES", "2")))
    sys.exit(run_main(main))
