"""Saving, restoring onto other meshes, and the errors of checkpoints that cannot be used."""

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from dsr_jax.core.errors import CheckpointError, DamagedCheckpointError, StuckSaveError
from dsr_jax.parallel.mesh import MeshShape
from dsr_jax.training.checkpoints import (
    Checkpoints,
    list_steps,
    read_meta,
    restore_params,
)
from dsr_jax.training.checksums import checksums, record_checksum
from tests.training.toy_training import Run, Toy, flat, optimizer

WIDE = 256
"""Width at which arrays are stored in files of their own, not inside the index."""


def equal(got: Any, want: dict[str, np.ndarray]) -> None:
    got = flat(got)
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].dtype == value.dtype
        np.testing.assert_array_equal(got[name], value, err_msg=name)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, dict[str, np.ndarray]]:
    """A run on mesh (2, 4, 1) with checkpoints of steps 2, 3 and 5, and the arrays of step 5."""
    run = Run(tmp_path_factory.mktemp("run"), MeshShape(2, 4, 1), Toy(WIDE))
    state = run.init()
    with run.checkpoints(keep_latest=9) as checkpoints:
        for step in range(1, 6):
            state, _ = run.step(state, run.batch(step))
            if step in (2, 3, 5):
                checkpoints.save(step, state, extra={"note": step})
    return run, flat(state)


@pytest.fixture
def copy(saved: Any, tmp_path: Path) -> Path:
    """A checkpoint folder that a test may damage."""
    shutil.copytree(saved[0].workdir / "checkpoints", tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


@pytest.mark.parametrize("shape", [MeshShape(8, 1, 1), MeshShape(1, 4, 2)])
def test_restores_onto_another_mesh(saved: Any, shape: MeshShape) -> None:
    run = Run(saved[0].workdir, shape, Toy(WIDE))
    with run.checkpoints() as checkpoints:
        state, extra = checkpoints.restore(run.abstract)
    equal(state, saved[1])
    assert extra == {"note": 5}
    for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(run.shardings), strict=True):
        assert leaf.sharding == sharding


def test_a_restored_state_is_trained_by_the_same_program(saved: Any) -> None:
    """Another program, as for weak types or layouts of its own, would round in other places."""
    run = saved[0]
    with run.checkpoints() as checkpoints:
        restored, _ = checkpoints.restore(run.abstract)
    programs = {run.step.lower(s, run.batch(0)).as_text() for s in (run.init(), restored)}
    assert len(programs) == 1


@pytest.mark.parametrize("ema", [None, "0.9"])
def test_parameters_or_ema_weights_are_restored_alone(saved: Any, ema: str | None) -> None:
    run, arrays = saved
    params, meta = restore_params(run.workdir / "checkpoints", run.abstract.params, ema=ema)
    prefix = "params/" if ema is None else f"ema/{ema}/"
    equal(params, {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)})
    assert meta["step"] == 5 and meta["architecture"] == {"model.width": WIDE}
    assert meta["packages"]["jax"] == jax.__version__


def test_a_save_is_not_touched_by_the_steps_that_follow(tmp_path: Path) -> None:
    """The arrays are copied before `save` returns, though written later."""
    run = Run(tmp_path, MeshShape(8, 1, 1), Toy(WIDE))
    state = run.init()
    with run.checkpoints() as checkpoints:
        want = {name: value.copy() for name, value in flat(state).items()}
        checkpoints.save(0, state)
        for step in range(3):
            state, _ = run.step(state, run.batch(step))
        checkpoints.wait()
        equal(checkpoints.restore(run.abstract)[0], want)
        checkpoints.save(0, state)  # There already: left as it is.
        checkpoints.wait()
        equal(checkpoints.restore(run.abstract)[0], want)


def test_latest_and_round_steps_stay(tmp_path: Path) -> None:
    run = Run(tmp_path)
    state = run.init()
    with run.checkpoints(every_steps=2, keep_latest=2, keep_every=6) as checkpoints:
        assert [step for step in range(1, 7) if checkpoints.due(step)] == [2, 4, 6]
        assert checkpoints.latest_step() is None
        for step in range(2, 17, 2):
            checkpoints.save(step, state)
        checkpoints.wait()
        assert checkpoints.steps() == [6, 12, 14, 16]
    assert list_steps(tmp_path / "checkpoints") == [6, 12, 14, 16]
    assert list_steps(tmp_path / "absent") == []


def test_a_killed_save_leaves_nothing_behind(copy: Path) -> None:
    leftover = copy / "7.orbax-checkpoint-tmp"
    leftover.mkdir()
    (leftover / "half").write_text("x")
    assert list_steps(copy) == [2, 3, 5]
    with Checkpoints(copy, every_steps=1):
        assert not leftover.exists()


def poll(checkpoints: Checkpoints, seconds: float = 20.0) -> None:
    """Asks for errors as the loop does after every step."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        checkpoints.raise_errors()
        time.sleep(0.02)


def test_an_error_in_the_background_is_raised_after_a_following_step(
    saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not only when the next save, or the end, waits for it."""
    before = ocp.CheckpointManager._finalize_checkpoint

    def fail(manager: Any, step: int) -> Any:
        if step == 2:
            raise OSError(28, "No space left on device")
        return before(manager, step)

    monkeypatch.setattr(ocp.CheckpointManager, "_finalize_checkpoint", fail)
    run = saved[0].elsewhere(tmp_path)
    with run.checkpoints() as checkpoints:
        checkpoints.save(1, run.init())
        checkpoints.save(2, run.init())
        with pytest.raises(CheckpointError, match="No space left on device"):
            poll(checkpoints)


def test_a_save_that_does_not_end_is_an_error_and_not_waited_for(
    saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = threading.Event()
    monkeypatch.setattr(
        ocp.CheckpointManager, "_finalize_checkpoint", lambda *args: storage.wait(60)
    )
    run = saved[0].elsewhere(tmp_path)
    try:
        with pytest.raises(StuckSaveError, match="saving step 2 to .* has not ended after 1 s"):
            with run.checkpoints(save_seconds=1.0) as checkpoints:
                checkpoints.save(2, run.init())
                checkpoints.raise_errors()
                checkpoints.wait()
    finally:
        storage.set()


def test_earlier_step_sets_later_ones_aside(saved: Any, copy: Path) -> None:
    run = saved[0]
    with Checkpoints(copy, every_steps=1) as checkpoints:
        state, extra = checkpoints.restore(run.abstract, step=2)
        assert extra == {"note": 2}
        assert checkpoints.set_aside_after(2) == [3, 5]
        assert checkpoints.steps() == [2]
        checkpoints.save(3, state)
        checkpoints.wait()
        checkpoints.set_aside_after(2)
    aside = copy.with_name("checkpoints_set_aside")
    assert sorted(path.name for path in aside.iterdir()) == ["3", "3.1", "5"]
    assert read_meta(aside, 5)["extra"] == {"note": 5}


# Errors


def files_of(step: Path) -> Iterator[Path]:
    return (path for path in sorted(step.rglob("*")) if path.is_file() and path.stat().st_size)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) * 2 // 3] ^= 0x10
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, flip_bit, Path.unlink])
def test_damage_of_any_file_is_named_or_harmless(
    saved: Any, copy: Path, damage: Callable[[Path], Any], capfd: pytest.CaptureFixture[str]
) -> None:
    """Restores the right numbers or raises; never other numbers, never another step."""
    run, arrays = saved
    named = []
    for path in list(files_of(copy / "5")):
        backup = path.read_bytes()
        damage(path)
        try:
            with Checkpoints(copy, every_steps=1) as checkpoints:
                equal(checkpoints.restore(run.abstract)[0], arrays)
        except CheckpointError as error:
            assert f"{copy / '5'} is damaged" in error.problem
            assert "other steps there: 2, 3" in error.remedy
            assert "sets this one aside and continues from step 3" in error.remedy
            named.append(path.relative_to(copy / "5").parts)
        path.write_bytes(backup)
    assert any(parts[-2:-1] == ("d",) for parts in named), "the arrays' own files are not noticed"
    assert ("meta", "metadata") in named
    assert "Event loop" not in capfd.readouterr().err


def test_flipped_bits_in_the_record_are_found_by_its_checksum(saved: Any, copy: Path) -> None:
    """Even those that leave JSON: a name of a key, a digit of a checksum or of `extra`."""
    path = copy / "5" / "meta" / "metadata"
    whole = path.read_bytes()
    for place in range(0, len(whole), len(whole) // 40):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(CheckpointError, match="5 is damaged"):
            read_meta(copy, 5)
    path.write_bytes(whole.replace(b'"note":5', b'"note":6').replace(b'"note": 5', b'"note": 6'))
    with pytest.raises(CheckpointError, match="the checksum of its record does not agree"):
        read_meta(copy, 5)


def test_another_format_is_no_damage(saved: Any, copy: Path) -> None:
    """A checkpoint of a later version is whole: it must not be set aside as a damaged one."""
    path = copy / "5" / "meta" / "metadata"
    meta = json.loads(path.read_bytes())
    del meta["checksum"]
    meta["format"] = 3
    path.write_text(json.dumps({**meta, "checksum": record_checksum(meta)}))
    with pytest.raises(CheckpointError, match="5 has format 3, but this .* reads 2\n") as error:
        read_meta(copy, 5)
    assert not isinstance(error.value, DamagedCheckpointError)
    assert "use the version that wrote it" in error.value.remedy


def test_flipped_bits_in_arrays_are_found_by_checksum(saved: Any, copy: Path) -> None:
    """The storage format itself notices some of these, not all; some bits are not read."""
    run, arrays = saved
    largest = max(files_of(copy / "5"), key=lambda path: path.stat().st_size)
    whole = largest.read_bytes()
    messages = []
    for place in range(len(whole) // 16, len(whole), len(whole) // 8):
        largest.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        try:
            with Checkpoints(copy, every_steps=1) as checkpoints:
                equal(checkpoints.restore(run.abstract)[0], arrays)
        except CheckpointError as error:
            messages.append(error.problem)
    assert all("is damaged" in message for message in messages)
    assert any("the checksum of" in message for message in messages)


def test_checksums_depend_on_value_and_position_but_not_on_mesh(saved: Any) -> None:
    run = saved[0]
    rows = np.arange(48, dtype=np.float32).reshape(8, 6)
    trees = [rows, rows[:, ::-1], rows[::-1], rows.T.copy(), rows + 1]
    sums = [checksums({"a": jnp.asarray(tree)})["a"] for tree in trees]
    assert len(set(sums)) == 5
    reshard = jax.device_put(rows, run.shardings.params["w2"])
    assert checksums({"a": reshard}) == checksums({"a": jnp.asarray(rows)})
    for dtype in (jnp.bfloat16, jnp.int8, bool, jnp.int32):
        one, two = (checksums([jnp.asarray(v, dtype)]) for v in ([0, 1, 1], [1, 0, 1]))
        assert one != two
    assert checksums({"a": jnp.float32(0.0)}) != checksums({"a": jnp.float32(-0.0)})


def test_another_architecture_is_shown_by_key_and_shape(saved: Any) -> None:
    other = Run(saved[0].workdir, MeshShape(8, 1, 1), Toy(WIDE + 64))
    with other.checkpoints() as checkpoints, pytest.raises(CheckpointError) as caught:
        checkpoints.restore(other.abstract)
    text = str(caught.value)
    assert "is of another architecture" in text
    assert f"config.model.width: {WIDE} -> {WIDE + 64}" in text
    assert f"params/w1: float32(16, {WIDE}) -> float32(16, {WIDE + 64})" in text
    assert len(text.splitlines()) < 24
    with pytest.raises(CheckpointError, match="another architecture"):
        restore_params(saved[0].workdir / "checkpoints", other.abstract.params)


def test_absent_arrays_are_named_on_both_sides(saved: Any) -> None:
    run = saved[0]
    renamed = dict(run.abstract.params)
    renamed["w9"] = renamed.pop("w2")
    with pytest.raises(CheckpointError) as caught:
        restore_params(run.workdir / "checkpoints", renamed)
    assert f"params/w2: float32({WIDE}, 16) -> absent" in str(caught.value)
    assert f"params/w9: absent -> float32({WIDE}, 16)" in str(caught.value)


def test_ema_decays_may_change(saved: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """A new decay starts from the parameters, one that is not asked for is dropped."""
    run, arrays = saved
    other = Run(run.workdir, MeshShape(8, 1, 1), Toy(WIDE), ema_decays=(0.9, 0.75))
    with other.checkpoints() as checkpoints:
        state, _ = checkpoints.restore(other.abstract)
    got = flat(state)
    for name in ("w1", "w2", "table"):
        np.testing.assert_array_equal(got[f"ema/0.75/{name}"], arrays[f"params/{name}"])
        np.testing.assert_array_equal(got[f"ema/0.9/{name}"], arrays[f"ema/0.9/{name}"])
    assert not any(name.startswith("ema/0.5/") for name in got)
    shown = capsys.readouterr().err
    assert "decay 0.75 are new: they start from the weights of step 5" in shown
    assert "decay 0.5 are dropped" in shown
    # The step donates its state: no buffer may stand in it twice.
    other.step(state, other.batch(5))
    with pytest.raises(CheckpointError, match="no EMA weights of decay 0.75.*\n.*0.5, 0.9"):
        restore_params(run.workdir / "checkpoints", other.abstract.params, ema="0.75")


@pytest.mark.parametrize("changes", [{"clip_norm": 0.0}, {"weight_decay": 0.0}])
def test_clipping_and_decay_may_change(saved: Any, changes: dict[str, float]) -> None:
    other = Run(saved[0].workdir, MeshShape(8, 1, 1), Toy(WIDE), tx=optimizer(**changes))
    with other.checkpoints() as checkpoints:
        equal(checkpoints.restore(other.abstract)[0], saved[1])


def test_frozen_parameters_may_change(
    saved: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Moments of what is frozen are dropped; those of what no longer is start at 0."""
    run, arrays = saved
    frozen = Run(run.workdir, MeshShape(8, 1, 1), Toy(WIDE), tx=optimizer(freeze=("w1",)))
    moments = {f"opt_state/0/{name}/w1" for name in ("mu", "nu")}
    with frozen.checkpoints() as checkpoints:
        state, _ = checkpoints.restore(frozen.abstract)
    equal(state, {name: array for name, array in arrays.items() if name not in moments})
    frozen = frozen.elsewhere(tmp_path)
    with frozen.checkpoints() as checkpoints:
        checkpoints.save(5, state)
        checkpoints.wait()
        restored, _ = checkpoints.restore(run.abstract)
    equal(restored, {n: np.zeros_like(a) if n in moments else a for n, a in arrays.items()})
    assert "2 moments of parameters frozen until step 5 are 0" in capsys.readouterr().err


def test_moments_are_found_where_older_checkpoints_have_them(saved: Any, tmp_path: Path) -> None:
    """There clipping came first in the chain, so that the moments had another index."""
    run = saved[0].elsewhere(tmp_path)
    state = run.init()
    with run.checkpoints() as checkpoints:
        older = state.replace(opt_state=(optax.EmptyState(), *state.opt_state))
        checkpoints.save(1, older)
        checkpoints.wait()
        equal(checkpoints.restore(run.abstract)[0], flat(state))


def test_another_training_state_is_distinguished_from_another_architecture(saved: Any) -> None:
    run = saved[0]
    other = run.abstract.replace(opt_state=())
    with run.checkpoints() as checkpoints, pytest.raises(CheckpointError) as caught:
        checkpoints.restore(other)
    assert "fits the model, but not the training state" in str(caught.value)
    assert "opt_state/0/mu/w1: float32" in str(caught.value)


def test_missing_steps_and_folders_are_named(saved: Any, tmp_path: Path) -> None:
    run = saved[0]
    with pytest.raises(CheckpointError, match="no checkpoint of step 4 .*\n.*2, 3, 5"):
        restore_params(run.workdir / "checkpoints", run.abstract.params, step=4)
    with pytest.raises(CheckpointError, match=f"no checkpoint in {tmp_path}/x"):
        read_meta(tmp_path / "x")
    assert not (tmp_path / "x").exists()
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        Checkpoints(tmp_path / "y", every_steps=1).restore(run.abstract)


def test_foreign_folders_are_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_text("x")
    with pytest.raises(CheckpointError, match="no checkpoints: holiday.jpg"):
        Checkpoints(tmp_path, every_steps=1)
    with pytest.raises(CheckpointError, match="is a file"):
        Checkpoints(tmp_path / "holiday.jpg", every_steps=1)
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.jpg"]


def test_a_numbered_folder_of_something_else_is_no_checkpoint(saved: Any, tmp_path: Path) -> None:
    (tmp_path / "12").mkdir()
    (tmp_path / "12" / "notes.json").write_text(json.dumps({}))
    with pytest.raises(CheckpointError, match="12 is damaged"):
        restore_params(tmp_path, saved[0].abstract.params)
