"""The loop: exact resume, log records, hooks, and stopping at numbers that are none."""

import errno
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsr_jax.core.errors import CheckpointError, DamagedCheckpointError, NumericsError
from dsr_jax.parallel.mesh import MeshShape
from dsr_jax.telemetry.writers import read_metrics
from dsr_jax.training import checkpoint_reading
from dsr_jax.training.checkpoints import list_steps
from dsr_jax.training.loop import Hook
from dsr_jax.training.metrics import MetricWindow
from tests.training.toy_training import Run, flat, optimizer

STEPS = 10


def equal(got: Any, want: dict[str, np.ndarray]) -> None:
    got = flat(got)
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)


def damage(step: Path) -> None:
    (step / "state" / "manifest.ocdbt").write_bytes(b"")


def records(workdir: Path) -> list[dict[str, Any]]:
    """Log records without the timings, the only thing that differs between runs."""
    timings = ("step_seconds", "images_per_second", "mfu")
    return [{k: v for k, v in r.items() if k not in timings} for r in read_metrics(workdir)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, dict[str, np.ndarray]]:
    """A run of all steps without interruption, and its last state."""
    run = Run(tmp_path_factory.mktemp("whole"), MeshShape(8, 1, 1))
    return run, flat(run.train(STEPS).state)


@pytest.fixture
def again(whole: Any, tmp_path: Path) -> Run:
    """The same run in a new folder, already compiled."""
    return whole[0].elsewhere(tmp_path)


@pytest.mark.parametrize("pieces", [(4,), (1, 1, 5), (7,)])
def test_pieces_equal_the_whole_bit_for_bit(
    whole: Any, again: Run, pieces: tuple[int, ...]
) -> None:
    """Also where a piece ends inside a log window or between two checkpoints."""
    for steps in pieces:
        summary = again.train(STEPS, stop_after_steps=steps)
        assert summary.stopped == "stop_after_steps" and summary.exit_status == 0
        assert summary.steps_here == steps
    summary = again.train(STEPS)
    assert (summary.step, summary.stopped) == (STEPS, "")
    equal(summary.state, whole[1])
    assert records(again.workdir) == records(whole[0].workdir)


def test_a_complete_run_is_left_as_it_is(whole: Any, capsys: pytest.CaptureFixture[str]) -> None:
    before = records(whole[0].workdir)
    summary = whole[0].train(STEPS)
    assert summary.steps_here == 0
    equal(summary.state, whole[1])
    assert records(whole[0].workdir) == before
    assert "the run is complete" in capsys.readouterr().err


def test_checkpoints_come_at_their_cadence_and_at_the_end(whole: Any) -> None:
    assert list_steps(whole[0].workdir / "checkpoints") == [8, 10]


def test_records_come_at_their_cadence(whole: Any) -> None:
    written = records(whole[0].workdir)
    assert [record["step"] for record in written] == [3, 6, 9]
    assert sum(v for k, v in written[0].items() if k.startswith("count_t/")) == 3 * 16
    assert {"loss", "grad_norm", "param_norm", "learning_rate", "dropped_labels"} <= set(written[0])
    rate = optimizer().learning_rate(8)
    np.testing.assert_allclose(written[2]["learning_rate"], rate, rtol=1e-6)


def test_an_earlier_step_can_be_gone_back_to(whole: Any, again: Run) -> None:
    again.train(STEPS)
    with pytest.raises(CheckpointError, match="no checkpoint of step 3"):
        again.train(STEPS, restore_step=3)
    summary = again.train(STEPS, restore_step=8)
    assert summary.steps_here == 2
    equal(summary.state, whole[1])
    assert list_steps(again.workdir / "checkpoints_set_aside") == [10]


def test_a_start_again_does_not_go_back_again(
    again: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    """A launcher repeats the same command; a start without the request lets the next go back."""
    again.train(STEPS)
    assert again.train(STEPS, restore_step=8, stop_after_steps=1).step == 9
    summary = again.train(STEPS, restore_step=8)
    assert (summary.step, summary.steps_here) == (STEPS, 1)
    assert "restore_step=8 was done by an earlier start" in capsys.readouterr().err
    assert again.train(STEPS, restore_step=9).steps_here == 1
    assert again.train(STEPS).steps_here == 0
    assert again.train(STEPS, restore_step=9).steps_here == 1


def test_checkpoints_that_are_gone_never_mean_a_start_from_scratch(again: Run) -> None:
    again.train(STEPS, stop_after_steps=6)
    shutil.move(again.workdir / "checkpoints", again.workdir / "elsewhere")
    with pytest.raises(
        CheckpointError, match="the run saved step 6, but .* no checkpoint"
    ) as error:
        again.train(STEPS)
    assert [record["step"] for record in records(again.workdir)] == [3, 6]
    # Both remedies: the folder back, or from the beginning.
    (again.workdir / "checkpoints").rmdir()
    shutil.move(again.workdir / "elsewhere", again.workdir / "checkpoints")
    assert again.train(STEPS, stop_after_steps=1).step == 7
    shutil.rmtree(again.workdir / "checkpoints")
    assert f"remove {again.workdir / 'checkpoints.json'}" in error.value.remedy
    (again.workdir / "checkpoints.json").unlink()
    assert again.train(STEPS).steps_here == STEPS


def test_a_run_is_recorded_before_its_first_save(again: Run) -> None:
    """By which a start knows that no checkpoint is missing, whatever the metrics hold."""
    seen: list[Any] = []

    def look(step: int, state: Any) -> None:
        seen.append(json.loads((again.workdir / "checkpoints.json").read_text())["newest"])

    again.train(STEPS, stop_after_steps=2, hooks=[Hook(1, look)])
    assert seen[0] is None
    assert again.train(STEPS, stop_after_steps=1).step == 3


def test_a_damaged_record_of_saves_is_named(again: Run) -> None:
    again.train(STEPS, stop_after_steps=6)
    path = again.workdir / "checkpoints.json"
    for text in ("{", "[]", '{"newest": "six"}', '{"hooks": 7}', '{"hooks": [1, "x"]}', "\xff"):
        path.write_text(text, encoding="latin-1")
        with pytest.raises(CheckpointError, match=f"{path} is damaged.*\n.*remove it"):
            again.train(STEPS)
    path.unlink()
    assert again.train(STEPS).steps_here == STEPS - 6


def test_hooks_are_called_at_their_cadence_with_the_state(again: Run) -> None:
    seen: list[tuple[str, int, int]] = []

    def note(name: str) -> Callable[[int, Any], None]:
        return lambda step, state: seen.append((name, step, int(state.step)))

    hooks = [Hook(4, note("a")), Hook(0, note("never")), Hook(5, note("b"))]
    again.train(STEPS, hooks=hooks)
    assert seen == [("a", 4, 4), ("b", 5, 5), ("a", 8, 8), ("a", 10, 10), ("b", 10, 10)]


def test_what_a_hook_returns_is_logged_behind_its_step(again: Run) -> None:
    again.train(STEPS, hooks=[Hook(5, lambda step, state: {"score": step / 2})])
    scores = [record for record in read_metrics(again.workdir) if "score" in record]
    assert scores == [{"step": 5, "score": 2.5}, {"step": 10, "score": 5.0}]


def scored_hooks(seen: list[tuple[str, int]]) -> list[Hook]:
    """Two hooks that note their calls and return a number of the state."""

    def score(name: str) -> Callable[[int, Any], dict[str, float]]:
        def call(step: int, state: Any) -> dict[str, float]:
            seen.append((name, step))
            return {name: float(state.step)}

        return call

    return [Hook(3, score("a")), Hook(6, score("b"))]


@pytest.mark.parametrize("stop", [6, 10])
def test_hooks_of_the_step_of_a_stop_are_called_by_the_next_start(
    again: Run, tmp_path: Path, stop: int
) -> None:
    """A signal leaves no time for them; also behind the last step."""
    seen: list[tuple[str, int]] = []

    def signalled(state: Any, batch: Any) -> Any:
        if int(state.step) == stop - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return again.step(state, batch)

    first = again.train(STEPS, step_fn=signalled, hooks=scored_hooks(seen))
    assert first.step == stop and stop not in [step for _, step in seen]
    again.train(STEPS, hooks=scored_hooks(seen))
    again.train(STEPS, hooks=scored_hooks(seen))
    whole = again.elsewhere(tmp_path / "whole")
    whole.train(STEPS, hooks=scored_hooks([]))
    assert records(again.workdir) == records(whole.workdir)
    assert seen == [("a", 3), ("a", 6), ("b", 6), ("a", 9), ("a", 10), ("b", 10)]


@pytest.mark.parametrize("failing", [pytest.param("a", marks=pytest.mark.slow), "b"])
def test_hooks_after_one_that_ends_the_process_are_called_by_the_next_start(
    again: Run, tmp_path: Path, failing: str
) -> None:
    """Those before it are not called again, and no record is written twice."""
    seen: list[tuple[str, int]] = []
    hooks = scored_hooks(seen)
    at = "ab".index(failing)

    def fail(step: int, state: Any) -> dict[str, float]:
        if step == 6:
            raise RuntimeError("killed")
        return hooks[at].call(step, state)  # type: ignore[return-value]

    broken = [Hook(h.every_steps, fail) if i == at else h for i, h in enumerate(hooks)]
    with pytest.raises(RuntimeError, match="killed"):
        again.train(STEPS, hooks=broken, stop_after_steps=6)
    again.train(STEPS, hooks=hooks)
    whole = again.elsewhere(tmp_path / "whole")
    whole.train(STEPS, hooks=scored_hooks([]))
    assert records(again.workdir) == records(whole.workdir)
    assert seen == [("a", 3), ("a", 6), ("b", 6), ("a", 9), ("a", 10), ("b", 10)]
    # A start that goes back keeps the records of its step, and calls those after it again.
    again.train(STEPS, hooks=hooks, restore_step=8)
    assert seen[6:] == [("a", 9), ("a", 10), ("b", 10)]
    assert records(again.workdir) == records(whole.workdir)


def test_a_run_of_a_program_that_did_not_note_hooks_does_not_repeat_them(again: Run) -> None:
    again.train(STEPS, stop_after_steps=6)
    path = again.workdir / "checkpoints.json"
    path.write_text(json.dumps({"newest": 6, "went_back_to": -1}))
    seen: list[tuple[str, int]] = []
    again.train(STEPS, hooks=scored_hooks(seen), stop_after_steps=1)
    assert seen == []
    again.train(STEPS, hooks=scored_hooks(seen))
    assert seen == [("a", 9), ("a", 10), ("b", 10)]


def test_a_damaged_newest_checkpoint_is_set_aside(
    whole: Any, again: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    again.train(STEPS, stop_after_steps=6)
    damage(again.workdir / "checkpoints" / "6")
    summary = again.train(STEPS)
    assert summary.steps_here == STEPS - 4
    equal(summary.state, whole[1])
    shown = capsys.readouterr().err
    aside = again.workdir / "checkpoints_set_aside"
    assert f"{again.workdir / 'checkpoints' / '6'} is damaged" in shown
    assert f"it was set aside: {aside / '6'}; step 4 is used" in shown
    assert list_steps(aside) == [6]
    assert records(again.workdir) == records(whole[0].workdir)


def test_a_damaged_checkpoint_without_an_earlier_one_is_an_error(again: Run) -> None:
    again.train(STEPS, stop_after_steps=6)
    for step in (4, 6):
        damage(again.workdir / "checkpoints" / str(step))
    for _ in range(2):
        with pytest.raises(CheckpointError, match="none of .* 6, 4 can be read.*6 is damaged"):
            again.train(STEPS)
    assert list_steps(again.workdir / "checkpoints") == [4, 6]


def test_checkpoints_behind_unreadable_storage_stay_where_they_are(
    whole: Any, again: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fails for all of them is no damage of one, and may pass."""
    again.train(STEPS, stop_after_steps=6)

    def stale(*_: Any) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="Stale.*\n.*storage"):
        patch.setattr(checkpoint_reading, "_restore", stale)
        again.train(STEPS)
    summary = again.train(STEPS)
    assert summary.steps_here == STEPS - 6
    equal(summary.state, whole[1])


def test_a_damaged_step_that_was_asked_for_is_an_error(again: Run) -> None:
    again.train(STEPS)
    damage(again.workdir / "checkpoints" / "8")
    with pytest.raises(CheckpointError, match="8 is damaged.*\n.*another step .10.*leave it out"):
        again.train(STEPS, restore_step=8)
    assert list_steps(again.workdir / "checkpoints") == [8, 10]
    assert again.train(STEPS, restore_step=10).steps_here == 0


def test_several_processes_leave_a_damaged_step_to_the_next_start(
    again: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of them may be alone in not reading it, while the others wait for it."""
    again.train(STEPS, stop_after_steps=6)
    damage(again.workdir / "checkpoints" / "6")
    with again.checkpoints() as checkpoints, pytest.raises(CheckpointError) as caught:
        with monkeypatch.context() as patch:
            patch.setattr(jax, "process_count", lambda: 2)
            checkpoints.leave_to_next_start(DamagedCheckpointError(6, "6 is damaged"))
    assert caught.value.exit_status == 75
    assert list_steps(again.workdir / "checkpoints") == [4, 6]
    assert again.train(STEPS).steps_here == STEPS - 4
    assert list_steps(again.workdir / "checkpoints_set_aside") == [6]


@pytest.mark.parametrize("bad_step", [6, 7, 8, 10])
def test_bad_numbers_stop_the_run_and_are_never_saved(again: Run, bad_step: int) -> None:
    """Also at step 8, where a save is due, and at the last step."""

    def poisoned(state: Any, batch: Any) -> Any:
        if int(state.step) == bad_step - 1:
            params = dict(state.params)
            params["w1"] = jax.device_put(
                jnp.full_like(params["w1"], np.nan), params["w1"].sharding
            )
            state = state.replace(params=params)
        return again.step(state, batch)

    with pytest.raises(NumericsError) as caught:
        again.train(STEPS, step_fn=poisoned)
    good = 4 if bad_step <= 8 else 8
    assert f"step {bad_step} is not finite: loss nan" in caught.value.problem
    assert f"the newest is step {good}" in caught.value.problem
    assert max(list_steps(again.workdir / "checkpoints")) == good
    with again.checkpoints() as checkpoints:
        state, _ = checkpoints.restore(again.abstract)
    assert all(np.isfinite(value).all() for value in flat(state).values())
    last = records(again.workdir)[-1]
    assert last["step"] == bad_step and last["loss"] is None


def test_a_bad_number_in_the_first_step_leaves_no_checkpoint(again: Run) -> None:
    def poisoned(state: Any, batch: Any) -> Any:
        image = batch["image"].astype(jnp.float32) * jnp.nan
        return again.step(state, {**batch, "image": jax.device_put(image, again.batch_sharding)})

    with pytest.raises(NumericsError, match="(?s)step 1 is not finite.*there is no checkpoint yet"):
        again.train(STEPS, step_fn=poisoned)
    assert list_steps(again.workdir / "checkpoints") == []


def test_an_open_window_survives_json() -> None:
    def metrics(step: int) -> dict[str, Any]:
        rng = np.random.default_rng(step)
        scalars = {name: np.float32(rng.normal()) for name in ("loss", "param_norm")}
        bins = {"bin_loss": rng.normal(size=3).astype("f"), "bin_count": np.float32([1, step, 0])}
        return {**scalars, **bins, "finite": np.bool_(True)}

    one = MetricWindow()
    for step in range(3):
        one.add(metrics(step))
    two = MetricWindow(json.loads(json.dumps(one.to_json())))
    one.add(metrics(3))
    two.add(metrics(3))
    record = one.flush()
    assert two.flush() == record
    np.testing.assert_allclose(record["loss"], np.mean([metrics(s)["loss"] for s in range(4)]))
    assert record["param_norm"] == metrics(3)["param_norm"]
    assert record["count_t/0.33-0.67"] == 6 and record["loss_t/0.67-1.00"] is None
    assert one.to_json() == MetricWindow().to_json()
