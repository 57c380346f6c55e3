"""The folder of a run: permitted contents before a start, and files that a start writes."""

from pathlib import Path

import pytest

from dsr_jax import config as configs
from dsr_jax.core import files
from dsr_jax.core.errors import (
    CheckpointError,
    ConfigError,
    DamagedFileError,
    DataError,
    LockError,
)
from dsr_jax.data import classes
from dsr_jax.parallel.processes import lock_folder
from dsr_jax.runs.folder import check_data, check_workdir, write_run_files
from dsr_jax.training.save_record import SaveRecord

DIGITS = str(Path(__file__).parents[2] / "configs" / "digits.py")


def test_config_survives_json(tmp_path: Path) -> None:
    config = configs.load(DIGITS)
    write_run_files(config, tmp_path / "run")
    assert configs.load_run(tmp_path / "run").to_dict() == config.to_dict()
    write_run_files(config, tmp_path / "run")
    stamps = files.read_json(tmp_path / "run" / "provenance.json")
    assert len(stamps) == 2 and stamps[0]["packages"]["jax"]
    values = configs.to_json(config) | {"novelty": 1}
    with pytest.raises(ConfigError, match="unknown key 'novelty'"):
        configs.from_json(values, "config.json")


def test_workdirs_are_ours_or_empty(tmp_path: Path) -> None:
    config = configs.load(DIGITS)
    assert check_workdir(config, tmp_path / "new") == []
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match="thesis.tex"):
        check_workdir(config, foreign)
    with pytest.raises(ConfigError, match="is a file"):
        check_workdir(config, foreign / "thesis.tex")
    with pytest.raises(ConfigError, match="holds no run"):
        configs.load_run(tmp_path / "new")


def test_a_class_that_appeared_or_vanished_is_named(tmp_path: Path) -> None:
    description: classes.DataDescription = {
        "source": "folder pets",
        "images": 3,
        "names": ["cat", "owl"],
        "counts": [2, 1],
        "fingerprint": "sha256:1",
    }
    check_data(tmp_path, description)
    classes.write_class_names(tmp_path, description)
    check_data(tmp_path, description)
    more: classes.DataDescription = {**description, "names": ["bee", "cat", "owl"]}
    assert "class 'bee' (label 0) appeared" in check_data(tmp_path, more)
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    with pytest.raises(DataError, match=r"class 'bee' \(label 0\) appeared") as error:
        check_data(tmp_path, more)
    assert error.value.remedy.endswith("--allow-change classes")
    assert "class 'bee' (label 0) appeared" in check_data(tmp_path, more, ["classes"])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of the digits with a checkpoint of step 4."""
    write_run_files(configs.load(DIGITS), tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "4").mkdir(parents=True)
    return tmp_path / "run"


def changed(run: Path, override: str, *allowed: str) -> list[str]:
    return check_workdir(configs.load(DIGITS, [f"--config.{override}"]), run, allowed)


def test_a_run_takes_changes_of_memory_speed_and_rate(run: Path) -> None:
    assert changed(run, "train.steps=9") == ["config.train.steps: 1200 -> 9"]
    assert changed(run, "model.remat=full") == ["config.model.remat: auto -> full"]
    assert changed(run, "optim.clip_norm=0.0") == ["config.optim.clip_norm: 1.0 -> 0.0"]


def test_what_is_learned_changes_only_when_asked(run: Path) -> None:
    with pytest.raises(ConfigError, match="what is learned:\n    config.seed: 0 -> 1\n") as error:
        changed(run, "seed=1")
    assert error.value.remedy.endswith("--allow-change seed")
    assert changed(run, "seed=1", "seed") == ["config.seed: 0 -> 1"]
    with pytest.raises(ConfigError, match="--allow-change objective.prediction"):
        changed(run, "objective.prediction=velocity", "seed")
    assert changed(run, "objective.prediction=velocity", "objective")


def test_another_architecture_is_refused_also_when_asked(run: Path) -> None:
    for allowed in ((), ("model",), ("seed",)):
        with pytest.raises(ConfigError, match="another architecture:\n.*hidden_size: 64 -> 128"):
            changed(run, "model.hidden_size=128", *allowed)


def test_a_run_that_never_saved_takes_any_change(run: Path) -> None:
    (run / "checkpoints" / "4").rmdir()
    assert changed(run, "model.hidden_size=128") == ["config.model.hidden_size: 64 -> 128"]
    assert changed(run, "data.global_batch=64") == ["config.data.global_batch: 128 -> 64"]


def test_checkpoints_that_are_gone_are_missed(run: Path) -> None:
    """By the record of saves, and by the metrics of runs that have none."""
    config = configs.load(DIGITS)
    (run / "checkpoints" / "4").rmdir()
    files.write_json(run / "checkpoints.json", {"newest": 4, "went_back_to": -1})
    with pytest.raises(CheckpointError, match="the run saved step 4, but .*\n.*put that folder"):
        check_workdir(config, run)
    (run / "checkpoints.json").unlink()
    metrics = run / "metrics.jsonl"
    metrics.write_text(f'{{"step": {config.checkpoint.every_steps - 1}}}\n')
    assert check_workdir(config, run) == []
    metrics.write_text(f'{{"step": {config.checkpoint.every_steps}}}\n')
    with pytest.raises(CheckpointError, match="metrics.jsonl is at step .* no checkpoint"):
        check_workdir(config, run)
    metrics.unlink()
    assert check_workdir(config, run) == []


def test_a_run_that_was_killed_in_its_first_save_begins_again(run: Path) -> None:
    """Its metrics are ahead of its checkpoints, but its record says that none was complete."""
    (run / "checkpoints" / "4").rename(run / "checkpoints" / "4.orbax-checkpoint-tmp-1")
    (run / "metrics.jsonl").write_text('{"step": 405}\n')
    SaveRecord(run / "checkpoints").note_begun()
    assert check_workdir(configs.load(DIGITS), run) == []


def test_leftovers_of_a_killed_start_are_no_foreign_files(tmp_path: Path) -> None:
    config = configs.load(DIGITS)
    (tmp_path / ".config.json.ab12cd_9.tmp").write_text("{")
    (tmp_path / ".lock.json").write_text("")
    (tmp_path / "failures").mkdir()
    assert check_workdir(config, tmp_path) == []
    write_run_files(config, tmp_path)
    assert not list(files.leftovers(tmp_path))
    assert check_workdir(config, tmp_path) == []


def test_one_command_at_a_time_writes_a_folder(tmp_path: Path) -> None:
    with lock_folder(tmp_path / "run"):
        with pytest.raises(LockError, match="is in use by process"), lock_folder(tmp_path / "run"):
            pass
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "7"])
def test_a_damaged_config_is_named(run: Path, text: str) -> None:
    (run / "config.json").write_text(text)
    for read in (lambda: changed(run, "seed=1"), lambda: configs.load_run(run)):
        with pytest.raises(DamagedFileError, match="config.json is damaged: .*\n.*from a copy"):
            read()
