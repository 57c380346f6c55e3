"""queued.sh keeps a run going on fake workers: preemption, failures, progress, and the end."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.launch import imitation

ROOT = Path(__file__).parents[2]
PLACE = ("--name=dsr", "--project=my-project", "--zone=us-west4-a")
COMMAND = ("python", "-m", "dsr_jax.train", "--workdir=~/bucket/runs/x", "--config.data.root=a b")

# A run's process, which takes the next line of its worker's plan: "5 1" saves step 5 and ends with
# status 1, "- late" ends with status 1 after a while, "5 wait" runs until it is ended,
# "5 preempt" loses the slice.
JOB = """#!/bin/bash
[ -f "$HOME/dsr_jax/setup.cfg" ] || exit 98
printf '%s\\n' "$@" > ~/arguments
plan=$IMITATION/plan.$(basename "$HOME")
read -r step status < "$plan"
[ "$(wc -l < "$plan")" -le 1 ] || sed -i 1d "$plan"
[ "$step" = - ] || mkdir -p "$HOME/bucket/runs/x/checkpoints/$step"
echo "from the job: $step $status"
case $status in
    wait) exec sleep 60 ;;
    late) sleep 0.3; status=1 ;;
    preempt) echo SUSPENDED > "$IMITATION/slice"; exec sleep 60 ;;
esac
exit "$status"
"""


class Cloud:
    """An imitated project with a slice of two workers, and what queued.sh did to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.programs = imitation.make(folder)
        (folder / "buckets" / "my-bucket").mkdir(parents=True)
        (folder / "job").write_text(JOB)
        (folder / "job").chmod(0o755)

    def keep(self, *plans: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        """Runs `keep` to its end; a plan for each worker, with ends of the run between commas."""
        for number, plan in enumerate(plans):
            lines = "".join(f"{line.strip()}\n" for line in plan.split(","))
            (self.folder / f"plan.{number}").write_text(lines)
        return self.launch("keep", *PLACE, "--poll=0", *self.options(*options), "--", *COMMAND)

    def options(self, *more: str) -> tuple[str, ...]:
        return ("--type=v5litepod-8", "--spot", "--bucket=my-bucket", *more)

    def launch(self, *words: str, script: str = "queued.sh") -> subprocess.CompletedProcess[str]:
        path = f"{self.programs}:{os.environ['PATH']}"
        return subprocess.run(
            [str(ROOT / "launch" / script), *words],
            env={**os.environ, "PATH": path, "IMITATION": str(self.folder)},
            capture_output=True,
            text=True,
            timeout=240,
        )

    def calls(self) -> list[list[str]]:
        return [json.loads(line) for line in (self.folder / "calls").read_text().splitlines()]

    def verbs(self) -> list[str]:
        """Last words of the commands that change something."""
        verbs = [call[0].split()[-1] for call in self.calls()]
        return [verb for verb in verbs if verb in ("create", "delete", "scp")]

    def starts(self) -> int:
        """How often the job was started on all workers."""
        return sum("nohup setsid" in " ".join(call) for call in self.calls())

    def slice(self) -> str:
        return (self.folder / "slice").read_text().strip()


@pytest.fixture
def cloud(tmp_path: Path) -> Cloud:
    return Cloud(tmp_path)


def test_a_run_is_installed_started_and_its_slice_released(cloud: Cloud) -> None:
    done = cloud.keep("5 0", "- 0")
    assert done.returncode == 0, done.stderr
    assert cloud.verbs() == ["create", "scp", "delete"] and cloud.slice() == "NONE"
    assert cloud.starts() == 1
    # Each worker's log is in the bucket, the machines are gone.
    logs = cloud.folder / "buckets" / "my-bucket" / "logs" / "dsr"
    assert sorted(path.name for path in logs.iterdir()) == ["0.log", "1.log"]
    assert (logs / "0.log").read_text() == "from the job: 5 0\n"


@pytest.mark.slow
def test_a_held_slice_stays_and_its_job_got_the_command(cloud: Cloud) -> None:
    done = cloud.keep("5 0", "- 0", options=("--hold",))
    assert done.returncode == 0 and "still rented" in done.stderr
    assert cloud.slice() == "ACTIVE"
    for worker in ("0", "1"):
        home = cloud.folder / "workers" / worker
        assert (home / "arguments").read_text().splitlines() == [
            *("-m", "dsr_jax.train", f"--workdir={home}/bucket/runs/x", "--config.data.root=a b")
        ]
    # The very command is complete; another is not.
    assert cloud.keep("- 7", "- 7", options=("--hold",)).returncode == 0
    assert cloud.starts() == 1
    (cloud.folder / "plan.0").write_text("- 0\n")
    (cloud.folder / "plan.1").write_text("- 0\n")
    words = ("keep", *PLACE, "--poll=0", *cloud.options("--hold"), "--", *COMMAND, "--more")
    assert cloud.launch(*words).returncode == 0
    assert cloud.starts() == 2


@pytest.mark.slow
def test_a_slice_that_was_taken_away_is_asked_for_again(cloud: Cloud) -> None:
    done = cloud.keep("5 preempt, 9 0", "- wait, - 0", options=("--failures=1",))
    assert done.returncode == 0, done.stderr
    assert cloud.verbs() == ["create", "scp", "delete", "create", "scp", "delete"]
    assert cloud.starts() == 2


@pytest.mark.slow
def test_a_run_that_makes_progress_is_continued_as_often_as_needed(cloud: Cloud) -> None:
    done = cloud.keep(
        "5 143, 10 75, 15 1, 20 143, 25 0",
        "- 143, - 75, - 75, - 143, - 0",
        options=("--failures=2",),
    )
    assert done.returncode == 0, done.stderr
    assert cloud.starts() == 5
    assert "the run failed with status 1: 1 of at most 2 times since step 15" in done.stderr


def test_a_run_that_fails_without_progress_is_given_up(cloud: Cloud) -> None:
    """Also where it runs for a while each time, and where another worker just stopped."""
    done = cloud.keep("5 143, - 143", "- late, - 1, - late", options=("--failures=3",))
    assert done.returncode == 1
    assert "status 1: 3 of at most 3 times since step 5" in done.stderr
    assert "from the job: - 143" in done.stderr  # The log's end.
    assert cloud.starts() == 3 and cloud.slice() == "NONE"


@pytest.mark.slow
def test_the_state_is_that_of_all_workers(cloud: Cloud) -> None:
    """Worker 0 alone would have seemed complete, and then for ever running."""
    done = cloud.keep("5 0, 5 wait", "- 1", options=("--failures=2",))
    assert done.returncode == 1
    assert "the run failed with status 1: 1 of at most 2" in done.stderr
    assert "some workers run and others do not: 2 of at most 2" in done.stderr


@pytest.mark.slow
def test_a_slice_that_does_not_answer_is_replaced(cloud: Cloud) -> None:
    (cloud.folder / "slice").write_text("ACTIVE\n")
    (cloud.folder / "silent").write_text("1\n")
    done = cloud.keep("5 0", "- 0", options=("--failures=2",))
    assert done.returncode == 0, done.stderr
    assert "the slice did not answer 10 times" in done.stderr
    assert cloud.verbs() == ["delete", "create", "scp", "delete"]


@pytest.mark.slow
def test_a_slice_that_cannot_be_had_is_not_asked_for_without_end(cloud: Cloud) -> None:
    (cloud.folder / "refuse").touch()
    done = cloud.keep("5 0", "- 0")
    assert done.returncode == 1 and "failed 10 of at most 10 times" in done.stderr
    assert cloud.verbs() == ["create", "delete"] * 10


def test_a_bucket_whose_folders_cannot_be_renamed_is_refused(cloud: Cloud) -> None:
    (cloud.folder / "flat").touch()
    done = cloud.keep("5 0", "- 0", options=("--failures=1",))
    assert done.returncode == 1 and "--enable-hierarchical-namespace" in done.stderr
    assert cloud.starts() == 0 and cloud.slice() == "NONE"


@pytest.mark.slow
def test_a_job_is_not_started_beside_another(cloud: Cloud) -> None:
    done = cloud.keep("5 0", "- 0", options=("--hold",))
    assert done.returncode == 0
    home = cloud.folder / "workers" / "0"
    (home / "job.status").unlink()
    (home / "job.pid").write_text(f"{os.getpid()}\n")
    done = cloud.launch("run", *PLACE, "--", "python", "other", script="tpu_vm.sh")
    assert done.returncode != 0 and "a job runs already" in done.stderr
    # After a restart of the machine the number is another process's.
    (home / "job.boot").write_text("another start\n")
    assert cloud.launch("status", *PLACE, script="tpu_vm.sh").stdout == "0 lost\n1 0\n"


@pytest.mark.slow
def test_waits_longer_before_each_try(cloud: Cloud) -> None:
    for number in range(2):
        (cloud.folder / f"plan.{number}").write_text("- 1\n")
    words = ("keep", *PLACE, "--poll=7", *cloud.options("--failures=4"), "--", *COMMAND)
    assert cloud.launch(*words).returncode == 1
    sleeps = [int(seconds) for seconds in (cloud.folder / "sleeps").read_text().split()]
    assert set(sleeps[:2]) == {7} and [seconds for seconds in sleeps if seconds > 7] == [14, 28]
