"""The launchers: what they would run, how they look after a run, and two processes for real."""

import os
import re
import shlex
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from dsr_jax.core.files import read_json

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(set(LAUNCH.glob("*.sh")) - {LAUNCH / "common.sh"})
PLACE = ("--name=dsr", "--project=p", "--zone=z")


def launch(
    script: str, *words: str, path: Path | None = None, timeout: int = 60
) -> subprocess.CompletedProcess[str]:
    """Runs a launcher, with programs of `path` before all others; by default they refuse to run."""
    folder = path or Path(__file__).parent / "refuse"
    return subprocess.run(
        [str(LAUNCH / script), *words],
        env={**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def printed(script: str, *words: str) -> list[list[str]]:
    """The commands of a dry run, as words."""
    done = launch(script, *words[:1], "--dry-run", *words[1:])
    assert done.returncode == 0, done.stderr
    lexer = shlex.shlex(done.stdout, posix=True, punctuation_chars=False)
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " ", True, ""
    commands: list[list[str]] = [[]]
    for word in lexer:
        first, *others = word.split("\n") if word.count("\n") == 1 else [word]
        commands[-1].append(first)
        commands += [[other] for other in others]
    return [command for command in commands if command != [""]]


def documented() -> list[str]:
    """Every launcher command in the README."""
    blocks = re.findall(r"```bash\n(.*?)```", (LAUNCH / "README.md").read_text(), re.DOTALL)
    return [line.strip() for block in blocks for line in block.splitlines() if "launch/" in line]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_script_has_help_and_a_dry_run(script: Path) -> None:
    done = launch(script.name, "--help")
    assert done.returncode == 0 and f"launch/{script.name}" in done.stdout
    assert "--dry-run" in done.stdout
    assert os.access(script, os.X_OK)


@pytest.mark.parametrize("command", documented())
def test_commands_of_the_readme_are_understood(command: str) -> None:
    program, *words = shlex.split(command)
    where = words.index("--") if "--" in words else len(words)
    done = launch(program.removeprefix("launch/"), *words[:where], "--dry-run", *words[where:])
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize(
    ("script", "words", "problem"),
    [
        ("tpu_vm.sh", ["create", *PLACE], "--type=... is missing"),
        ("tpu_vm.sh", ["create", *PLACE, "--type=h100"], "v5litepod-N"),
        ("tpu_vm.sh", ["run", *PLACE], "no command behind --"),
        ("tpu_vm.sh", ["status", "--name=a", "--zone=z"], "--project=... is missing"),
        ("local.sh", ["--processes=2", "--gpu=1"], "unknown option --gpu=1"),
        ("slurm.sh", ["--nodes=2", "python"], "unexpected argument python"),
        ("queued.sh", ["keep", *PLACE, "--type=v6e-8"], "no command behind --"),
    ],
)
def test_what_is_missing_is_named(script: str, words: list[str], problem: str) -> None:
    done = launch(script, *words)
    assert done.returncode == 2 and problem in done.stderr


def test_a_dry_run_creates_nothing(tmp_path: Path) -> None:
    gcloud = tmp_path / "gcloud"
    gcloud.write_text(f"#!/bin/sh\ntouch {tmp_path}/called\n")
    gcloud.chmod(0o755)
    words = ("create", *PLACE, "--type=v5litepod-16", "--spot", "--dry-run")
    done = launch("tpu_vm.sh", *words, path=tmp_path)
    assert done.stdout.split() == [
        *"gcloud compute tpus tpu-vm create dsr --project=p --zone=z".split(),
        "--accelerator-type=v5litepod-16",
        "--version=v2-alpha-tpuv5-lite",
        "--scopes=https://www.googleapis.com/auth/cloud-platform",
        "--spot",
    ]
    assert not (tmp_path / "called").exists()


def test_slurm_gets_one_task_per_gpu_and_a_signal_in_time() -> None:
    done = launch("slurm.sh", "--nodes=2", "--gpus=8", "--dry-run", "--", "python", "-m", "x y")
    assert done.returncode == 0
    for line in ("--nodes=2", "--ntasks-per-node=8", "--signal=TERM@120", "--requeue"):
        assert f"#SBATCH {line}\n" in done.stdout
    assert r"srun --kill-on-bad-exit=1 python -m x\ y" in done.stdout


@pytest.mark.parametrize(
    ("statuses", "requeued"),
    [([75] * 6, 4), ([75, 75, 143, 75, 75, 75, 75], 7), ([0], 0), ([1], 0)],
)
def test_slurm_queues_a_job_again_until_it_fails_without_end(
    tmp_path: Path, statuses: list[int], requeued: int
) -> None:
    done = launch("slurm.sh", "--nodes=1", "--gpus=1", "--failures=5", "--dry-run", "--", "true")
    script = done.stdout.split("<<'END'\n")[1].rsplit("END\n")[0]
    # The job changes to this checkout; here it must stay in its own folder.
    script = "\n".join(line for line in script.splitlines() if not line.startswith("cd "))
    for name, does in {"srun": "exit $(cat status)", "scontrol": "echo $@ >> calls"}.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{does}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "PATH": path}
    for status in statuses:
        (tmp_path / "status").write_text(str(status))
        run = subprocess.run(
            ["bash", "-c", script], cwd=tmp_path, env=slurm, capture_output=True, text=True
        )
        assert run.returncode == status
    calls = tmp_path / "calls"
    assert (calls.read_text().splitlines() if calls.exists() else []) == ["requeue 7"] * requeued
    if statuses == [75] * 6:
        assert "5 failures in a row" in run.stderr
        assert (tmp_path / "slurm-dsr-7.failures").read_text().count("n[1-2]") == 6


FAKE = """#!/usr/bin/env bash
# Stands in for gcloud: notes calls, tells scripted states, runs workers' commands in a folder.
echo "$@" | head -n 1 | tr -d '\\n' | cut -c -70 >> {folder}/calls
next() {{ head -n 1 "$1"; [ "$(wc -l < "$1")" -le 1 ] || sed -i 1d "$1"; }}
case "$*" in
    *describe*)
        state=$(next {folder}/slices)
        if [ "$state" = NONE ]; then echo "ERROR: NOT_FOUND" >&2; exit 1; fi
        echo "$state" ;;
    *job.status\\;*|*"echo absent"*) next {folder}/jobs ;;
esac
"""


@pytest.fixture
def cloud(tmp_path: Path) -> Path:
    """A folder with a gcloud that does as the files `slices` and `jobs` there say, line by line."""
    gcloud = tmp_path / "gcloud"
    gcloud.write_text(FAKE.format(folder=tmp_path))
    gcloud.chmod(gcloud.stat().st_mode | stat.S_IEXEC)
    return tmp_path


def keep(cloud: Path, slices: str, jobs: str, *more: str) -> tuple[int, list[str], str]:
    """Runs the loop against scripted states; returns its status, its calls and what it said."""
    (cloud / "slices").write_text("\n".join(slices.split()) + "\n")
    (cloud / "jobs").write_text("\n".join(jobs.split()) + "\n")
    options = ("--type=v5litepod-16", "--spot", "--poll=0", *more)
    done = launch("queued.sh", "keep", *PLACE, *options, "--", "python", "train", path=cloud)
    calls = (cloud / "calls").read_text().splitlines()
    verbs = [re.sub(r"^compute tpus (?:queued-resources|tpu-vm) (\w+) .*", r"\1", c) for c in calls]
    return done.returncode, [verb for verb in verbs if verb != "describe"], done.stderr


def test_a_slice_that_was_taken_away_is_asked_for_again(cloud: Path) -> None:
    slices = "NONE ACCEPTED ACTIVE ACTIVE SUSPENDED NONE PROVISIONING ACTIVE ACTIVE"
    status, calls, said = keep(cloud, slices, "absent running absent 0")
    assert status == 0 and "the run is complete" in said
    start = ["ssh", "scp", "ssh", "ssh"]  # Its state; files, installation, the command.
    again = ["delete", "create", *start, "ssh"]
    assert calls == ["create", *start, "ssh", *again]


def test_a_run_that_stopped_or_was_lost_continues(cloud: Path) -> None:
    status, calls, said = keep(cloud, "ACTIVE", "143 running lost running 0")
    assert status == 0
    assert said.count("continuing it") == 2
    assert calls.count("ssh") == 5 + 2


def test_a_run_that_fails_by_itself_is_given_up(cloud: Path) -> None:
    status, _, said = keep(cloud, "ACTIVE", "1", "--failures=2")
    assert status == 1
    assert "status 1, 2 of at most 2 times" in said


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_local_processes_train_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    done = launch(
        "local.sh",
        *("--processes=2", "--cpu-devices=1", "--", sys.executable, "-m", "dsr_jax.train"),
        *("--config=configs/digits.py:runlocal", f"--workdir={tmp_path / 'run'}"),
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (start,) = read_json(tmp_path / "run" / "provenance.json")
    assert start["num_processes"] == 2 and start["num_devices"] == 2
    assert read_json(tmp_path / "run" / "summary.json")["steps"] == 8


def test_local_processes_end_with_the_first_that_fails() -> None:
    program = (
        "import os, sys, time; os.environ['DSR_PROCESS_ID'] == '1' and sys.exit(7); time.sleep(50)"
    )
    words = ("--processes=2", "--cpu-devices=1", "--", sys.executable, "-c", program)
    done = launch("local.sh", *words, timeout=30)
    assert done.returncode == 7


def test_local_processes_know_who_they_are() -> None:
    commands = printed("local.sh", "--processes=2", "--port=5", "--cpu-devices=4", "--", "a b", "c")
    assert [command[-2:] for command in commands] == [["a b", "c"]] * 2
    for rank, command in enumerate(commands):
        assert {
            *("DSR_COORDINATOR=127.0.0.1:5", "DSR_NUM_PROCESSES=2", f"DSR_PROCESS_ID={rank}"),
            *("JAX_PLATFORMS=cpu", "JAX_NUM_CPU_DEVICES=4"),
        } < set(command)
