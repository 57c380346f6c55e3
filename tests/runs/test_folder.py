"""The folder of a run: what it may hold before a start, and what a start writes."""

from pathlib import Path

import pytest

from dsr_jax import config as configs
from dsr_jax.core import files
from dsr_jax.core.errors import ConfigError, DataError
from dsr_jax.data import classes
from dsr_jax.runs.folder import check_data, check_workdir, write_run_files

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

    run = tmp_path / "run"
    write_run_files(config, run)
    longer = configs.load(DIGITS, ["--config.train.steps=9"])
    assert check_workdir(longer, run) == ["config.train.steps: 1200 -> 9"]
    wider = configs.load(DIGITS, ["--config.model.hidden_size=128"])
    with pytest.raises(ConfigError, match="config.model.hidden_size: 64 -> 128"):
        check_workdir(wider, run)


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
    with pytest.raises(DataError, match=r"class 'bee' \(label 0\) appeared"):
        check_data(tmp_path, more)
