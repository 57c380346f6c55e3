"""Batches that are not finite: what the error names, and states that skip them."""

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsr_jax.core.errors import NumericsError
from dsr_jax.core.files import read_json
from dsr_jax.core.rng import sample_keys, stream_key, uniform_per_sample
from dsr_jax.diffusion.time_sampling import TimeSampler
from dsr_jax.parallel.mesh import MeshShape
from dsr_jax.training.checkpoints import list_steps
from dsr_jax.training.metrics import MetricWindow
from dsr_jax.training.nonfinite import describe_step
from dsr_jax.training.skipping import array_norms, skip_batches
from dsr_jax.training.state import TrainState
from dsr_jax.training.step_log import MAX_SKIPPED, PendingStep, StepLog
from tests.training.test_loop import equal, records
from tests.training.toy_training import BATCH, Run, flat

STEPS, BAD = 10, 6


def with_nan(run: Run, *bad: int) -> Any:
    """Batches of which those of some steps, from 1, have a sample that is no number."""

    def batches(start: int) -> Iterator[dict[str, jax.Array]]:
        for step in itertools.count(start):
            yield run.float_batch(step, nan=step + 1 in bad)

    return batches


@pytest.fixture(scope="module")
def skipping(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, dict[str, np.ndarray]]:
    """A run that skips what is not finite, and its last state."""
    run = Run(tmp_path_factory.mktemp("whole"), MeshShape(8, 1, 1), skip={"nonfinite": True})
    return run, flat(run.train(STEPS, batches=with_nan(run, BAD)).state)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("plain"), MeshShape(8, 1, 1))


def test_a_skipped_batch_changes_the_number_of_steps_alone(skipping: Any, plain: Run) -> None:
    state = plain.init()
    for step in range(STEPS):
        if step + 1 == BAD:
            state = dataclasses.replace(state, step=state.step + 1)
        else:
            state, _ = plain.step(state, plain.float_batch(step))
    equal(state, skipping[1])
    assert (
        flat(state)["opt_state/0/count"] == STEPS - 1 if "opt_state/0/count" in flat(state) else 1
    )
    written = records(skipping[0].workdir)
    assert [record.get("skipped_steps") for record in written] == [None, 1.0, None]
    assert np.isfinite(written[1]["loss"])


@pytest.mark.parametrize("pieces", [(5,), (6, 1)])
def test_pieces_with_a_skipped_batch_equal_the_whole(
    skipping: Any, tmp_path: Path, pieces: tuple[int, ...]
) -> None:
    run = skipping[0].elsewhere(tmp_path)
    for steps in (*pieces, 0):
        summary = run.train(STEPS, batches=with_nan(run, BAD), stop_after_steps=steps)
    equal(summary.state, skipping[1])
    assert records(tmp_path) == records(skipping[0].workdir)


def test_the_error_names_time_array_and_records_and_the_batch_can_be_left_out(
    skipping: Any, plain: Run, tmp_path: Path
) -> None:
    run = plain.elsewhere(tmp_path)
    with pytest.raises(NumericsError) as caught:
        run.train(STEPS, batches=with_nan(run, BAD))
    keys = sample_keys(stream_key(7, "time", BAD - 1), np.arange(BATCH) + (BAD - 1) * BATCH)
    # Every device's first row is the first of the process.
    t = float(TimeSampler("logit-normal", shift=2.0)(uniform_per_sample(keys))[0])
    low = int(t * 4) / 4
    text = caught.value.problem
    assert f"step {BAD} is not finite: loss nan" in text
    assert f"losses that are not finite: t in {low:.2f}-{low + 0.25:.2f}\n" in text
    assert "largest gradient: " in text and "norm nan (3 arrays" in text
    numbers = list(range((BAD - 1) * BATCH, BAD * BATCH))
    assert f"records of the batch: {', '.join(map(str, numbers))}\n" in text
    assert "the newest is step 4, finite" in text
    assert f"train.skip_steps=({BAD},)" in caught.value.remedy
    found = read_json(tmp_path / "failures" / f"step_{BAD:08d}.json")
    assert found["records"] == numbers and found["loss"] == "nan"
    assert list_steps(tmp_path / "checkpoints") == [4]
    # As the remedy says, to the same result as that of the policy.
    asked = Run(tmp_path, MeshShape(8, 1, 1), skip={"nonfinite": False, "steps": (BAD,)})
    summary = asked.train(STEPS, batches=with_nan(asked, BAD))
    assert summary.steps_here == STEPS - 4
    equal(summary.state, skipping[1])


def test_a_batch_that_is_finite_is_skipped_if_asked(plain: Run, tmp_path: Path, capsys) -> None:
    run = Run(tmp_path, MeshShape(8, 1, 1), skip={"nonfinite": False, "steps": (1, 2, 4)})
    run.train(2)
    fresh = plain.init()
    equal(run.train(2).state.params, flat(fresh.params))
    assert "step 2: its batch is skipped, as the config asks" in capsys.readouterr().err


def test_a_cause_other_than_single_batches_ends_the_run(skipping: Any, tmp_path: Path) -> None:
    run = skipping[0].elsewhere(tmp_path)
    bad = range(2, 2 + MAX_SKIPPED)
    with pytest.raises(NumericsError, match=f"{MAX_SKIPPED} steps in a row.* step {bad[-1]}"):
        run.train(100, batches=with_nan(run, *bad))


def discriminator_step(state: TrainState, batch: Any, variables: Any) -> Any:
    """A step whose losses and gradients are finite, but not what the discriminator becomes."""
    metrics = dict.fromkeys(("loss", "grad_norm", "param_norm", "learning_rate"), jnp.ones(()))
    bad = {"discriminator_loss": jnp.asarray(jnp.inf), "finite": jnp.asarray(False)}
    new = dataclasses.replace(state, step=state.step + 1, params=state.params + jnp.nan)
    return new, metrics | bad


def test_a_step_that_only_the_discriminator_fails_is_skipped_and_counted(tmp_path: Path) -> None:
    step = skip_batches(discriminator_step, nonfinite=True)
    zero = jnp.zeros((), jnp.int32)
    state = TrainState(step=zero, params=jnp.zeros(2), ema={}, opt_state=())
    lines: list[str] = []
    out = SimpleNamespace(
        records=lambda step: (), failures=None, progress=SimpleNamespace(log=lines.append)
    )
    log = StepLog(out, 100, MetricWindow(), None)  # type: ignore[arg-type]
    with pytest.raises(NumericsError, match=f"{MAX_SKIPPED} steps in a row are not finite"):
        for number in range(1, MAX_SKIPPED + 1):
            state, metrics = step(state, {}, None)
            log.add(PendingStep(number, metrics, None, None), wait=False)
        log.drain()
    assert state.step == MAX_SKIPPED and not np.any(state.params)
    assert len(lines) == MAX_SKIPPED and "discriminator_loss inf" in lines[0]


@pytest.mark.parametrize(
    "stack", ["blocks", "blocks_reg", "enc_blocks_pre", "dec_blocks", "layers"]
)
def test_norms_are_by_block_in_every_stack(stack: str) -> None:
    norms = array_norms({stack: {"w": jnp.ones((3, 2, 2))}, "w": jnp.ones((3, 2))})
    assert norms[f"{stack}/w"].shape == (3,) and norms["w"].shape == ()
    metrics = dict.fromkeys(("loss", "grad_norm", "param_norm", "learning_rate"), 1.0)
    bad = {name: np.asarray(norm) for name, norm in norms.items()}
    bad[f"{stack}/w"] = np.asarray([1.0, np.nan, 2.0])
    assert describe_step(1, metrics, bad).largest == f"{stack}/w, block 1"
