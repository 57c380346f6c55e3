"""The torture tool: it finds what a careless command loses, and the commands lose nothing."""

from pathlib import Path

import numpy as np
import pytest

from dsr_jax.core.errors import ConfigError
from tests.faults.worker import TOTAL
from tools import torture
from tools.faults.injection import Round, play_round
from tools.faults.jobs import Job


def numbers_job(*words: str) -> Job:
    """A job of tests/faults/worker.py."""
    return Job(
        "tests.faults.worker",
        lambda inputs, folder: [str(folder), *words],
        lambda folder: sorted(folder.glob("*.done")),
        lambda folder: [],
        lambda folder: {"numbers": (folder / "numbers.txt").read_text().split()},
    )


def play(tmp_path: Path, job: Job, seed: int, budget: int = 4) -> Round:
    reference = {"numbers": [str(i) for i in range(TOTAL)]}
    return play_round(
        job,
        tmp_path,
        tmp_path / f"out{seed}",
        tmp_path,
        reference,
        np.random.default_rng(seed),
        processes=1,
        budget=budget,
    )


def test_a_careful_command_loses_nothing(tmp_path: Path) -> None:
    found = play(tmp_path, numbers_job(), 5)
    assert found.problem == "" and found.faults.total() > 0


@pytest.mark.slow
def test_a_careless_command_is_found(tmp_path: Path) -> None:
    # These seeds begin with a kill.
    for seed in (30, 54):
        found = play(tmp_path, numbers_job("--careless"), seed, budget=1)
        assert found.faults == {"kill": 1} and found.starts > 1
        assert found.problem.startswith("another result: numbers: ")


def test_a_command_that_fails_by_itself_is_found(tmp_path: Path) -> None:
    job = numbers_job()
    broken = Job("tests.faults.no_such_module", job.words, job.outputs, job.damageable, job.result)
    assert "No module named" in play(tmp_path, broken, 2).problem


def test_results_of_other_code_are_not_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(torture.JOBS, "numbers", numbers_job())
    words = ["--job=numbers", "--faults=1", "--processes=1", f"--out={tmp_path}"]
    digests = iter("abb")
    monkeypatch.setattr(torture, "code_digest", lambda: next(digests))
    with pytest.raises(ConfigError, match="has changed during round 0"):
        torture.main(words)
    with pytest.raises(ConfigError, match="are of other code"):
        torture.main(words)


@pytest.mark.slow
@pytest.mark.parametrize("job", ["encode", "train"])
def test_commands_lose_nothing(tmp_path: Path, job: str, capsys) -> None:
    words = [f"--job={job}", "--faults=4", "--seed=3", "--processes=1", f"--out={tmp_path}"]
    assert torture.main(words) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "faults: 4, lost: 0"
    # The same command again has nothing left to do.
    assert torture.main(words) == 0
