"""The launchers: rejected options, dry runs, and two real processes."""

import functools
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from jax._src.clusters.cluster import ClusterEnv

from dsr_jax.core.files import read_json
from dsr_jax.parallel.topologies import CHIPS, Topology
from tests.launch import imitation

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(set(LAUNCH.glob("*.sh")) - {LAUNCH / "common.sh"})
PLACE = ("--name=dsr", "--project=my-project", "--zone=us-west4-a")


@functools.cache
def programs() -> Path:
    """A folder with imitated programs, that check their flags and have no cloud to work on."""
    return imitation.make(Path(tempfile.mkdtemp(prefix="launch_test_")))


def launch(
    script: str, *words: str, folder: Path | None = None, timeout: int = 60
) -> subprocess.CompletedProcess[str]:
    """Runs a launcher with imitated programs; without a folder of theirs, none may be called."""
    path = folder / "programs" if folder else programs()
    variables = {"IMITATION": str(folder)} if folder else {}
    return subprocess.run(
        [str(LAUNCH / script), *words],
        env={**os.environ, "PATH": f"{path}:{os.environ['PATH']}", **variables},
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


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_script_has_help_and_a_dry_run(script: Path) -> None:
    done = launch(script.name, "--help")
    assert done.returncode == 0 and f"launch/{script.name}" in done.stdout
    assert "--dry-run" in done.stdout
    assert os.access(script, os.X_OK)


KEEP = ("keep", *PLACE, "--type=v5litepod-16", "--bucket=b-1")
XPK = ("run", *PLACE, "--type=v5litepod-16", "--bucket=b-1", "--workload=w")
TRAIN = ("--", "python", "-m", "dsr_jax.train")


@pytest.mark.parametrize(
    ("script", "words", "problem"),
    [
        ("tpu_vm.sh", ["create", *PLACE], "--type=... is missing"),
        ("tpu_vm.sh", ["create", *PLACE, "--type"], "--type needs a value"),
        ("tpu_vm.sh", ["create", *PLACE, "--spot=no"], "--spot takes no value"),
        ("tpu_vm.sh", ["create", *PLACE, "--type=h100"], "v5litepod-N"),
        ("tpu_vm.sh", ["create", *PLACE, "--type=v5litepod-24"], "no such slice"),
        ("tpu_vm.sh", ["create", *PLACE, "--type=v5p-24"], "no such slice"),
        ("tpu_vm.sh", ["create", *PLACE, "--type=v4-0"], "no such slice"),
        ("tpu_vm.sh", ["create", *PLACE[1:], "--name=My_run"], "--name=My_run: must be lower-case"),
        ("tpu_vm.sh", ["create", *PLACE[:2], "--zone=us-west4"], "must be a zone"),
        ("tpu_vm.sh", ["install", *PLACE, "--bucket=gs://b-1"], "without gs://"),
        ("tpu_vm.sh", ["install", *PLACE, "--bucket=b-1/runs"], "no path behind it"),
        ("tpu_vm.sh", ["run", *PLACE], "no command after --"),
        ("tpu_vm.sh", ["run", *PLACE, *TRAIN, "--a=gs://b-1/x"], "write ~/bucket/..."),
        ("tpu_vm.sh", ["run", *PLACE, *TRAIN, "--a=$HOME/bucket/x"], "write ~/bucket/..."),
        (
            "tpu_vm.sh",
            ["run", *PLACE, *TRAIN, f"--a={Path.home()}/bucket/x"],
            "this machine's home",
        ),
        ("tpu_vm.sh", ["status", "--name=a", "--zone=us-a1-b"], "--project=... is missing"),
        ("local.sh", ["--processes=2", "--gpu=1"], "unknown option --gpu=1"),
        ("local.sh", ["--processes=none", "--", "true"], "must be a whole number from 1"),
        ("slurm.sh", ["--nodes=2", "python"], "unexpected argument python"),
        ("slurm.sh", ["--nodes=-1", "--gpus=8", "--", "true"], "--nodes=-1: must be a whole"),
        ("slurm.sh", ["--nodes=1", "--gpus=8", "--time=1 day", "--", "true"], "--time=1 day"),
        ("slurm.sh", ["--nodes=1", "--gpus=8", "--name=a/b", "--", "true"], "--name=a/b"),
        ("queued.sh", ["keep", *PLACE, "--type=v6e-8"], "--bucket=... is missing"),
        ("queued.sh", [*KEEP], "no command after --"),
        ("queued.sh", [*KEEP, "--failures=-1", *TRAIN], "--failures=-1"),
        ("queued.sh", [*KEEP, *TRAIN], "no --workdir=~/bucket/..."),
        ("queued.sh", [*KEEP, *TRAIN, "--workdir=runs/x"], "is not in the bucket"),
        ("queued.sh", [*KEEP, *TRAIN, "--workdir=~/runs/x"], "is not in the bucket"),
        ("queued.sh", [*KEEP, *TRAIN, "--workdir=~/bucket/"], "is not in the bucket"),
        ("queued.sh", [*KEEP, *TRAIN, "--workdir=~/bucket/../x"], "without .."),
        ("xpk.sh", [*XPK, *TRAIN, "--workdir=~/bucket/x"], "is not in the bucket"),
        ("xpk.sh", [*XPK, *TRAIN, "--workdir", "/data/x"], "is not in the bucket"),
        ("xpk.sh", [*XPK, "--workload=Rae_DiT", *TRAIN], "--workload=Rae_DiT: must be lower"),
        ("xpk.sh", [*XPK, f"--workload={'w' * 41}", *TRAIN], "at most 40 characters"),
        ("xpk.sh", [*XPK, "--slices=0", *TRAIN], "--slices=0: must be a whole number"),
    ],
)
def test_what_is_wrong_is_named_before_anything_is_called(
    script: str, words: list[str], problem: str
) -> None:
    done = launch(script, *words)
    assert done.returncode == 2 and problem in done.stderr


def test_every_slice_that_can_be_planned_for_can_be_created() -> None:
    types = {
        Topology("", chip, tuple(map(int, shape.split("x")))).accelerator_type
        for chip in CHIPS.values()
        for shape in chip.shapes
    }
    # xpk's own tables have these, too.
    for kind in {*types, "v5p-256", "v5p-12288", "v4-384"}:
        done = launch("tpu_vm.sh", "create", *PLACE, f"--type={kind}", "--dry-run")
        assert done.returncode == 0, done.stderr


def test_a_dry_run_creates_nothing() -> None:
    done = launch("tpu_vm.sh", "create", *PLACE, "--type=v5litepod-16", "--spot", "--dry-run")
    assert done.stdout.split() == [
        *"gcloud compute tpus tpu-vm create dsr --project=my-project --zone=us-west4-a".split(),
        "--accelerator-type=v5litepod-16",
        "--version=v2-alpha-tpuv5-lite",
        "--scopes=https://www.googleapis.com/auth/cloud-platform",
        "--spot",
    ]


def test_xpk_sends_the_last_commit_and_starts_again_after_what_it_should(tmp_path: Path) -> None:
    imitation.make(tmp_path)
    words = (*XPK, *TRAIN, "--workdir=/bucket/runs/x", "--config.data.root=a b")
    done = launch("xpk.sh", *words, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    attach, create = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    assert attach[:2] == ["xpk storage attach", "b-1"] and "--mount-point=/bucket" in attach
    # Beside xpk's own, 42 and 127-255, in which is 143.
    assert "--restart-on-exit-codes=75" in create and "--storage=b-1" in create
    (command,) = [word for word in create if word.startswith("--command=")]
    assert command.endswith(
        r"exec python -m dsr_jax.train --workdir=/bucket/runs/x --config.data.root=a\ b "
    )
    # The image is the commit, with its name in it, and nothing that was not committed.
    listing = ("git", "-C", str(ROOT), "ls-tree", "-r", "--name-only", "HEAD")
    files = subprocess.run(listing, capture_output=True, text=True, check=True).stdout.split()
    image = tmp_path / "image"
    assert {str(path.relative_to(image)) for path in image.rglob("*") if path.is_file()} == set(
        files
    )
    head = subprocess.run(
        ("git", "-C", str(ROOT), "rev-parse", "HEAD"), capture_output=True, text=True, check=True
    ).stdout
    assert (image / "dsr_jax" / "core" / "REVISION").read_text() == head


def test_slurm_gets_one_task_per_gpu_and_a_signal_in_time(tmp_path: Path) -> None:
    imitation.make(tmp_path)
    words = ("--nodes=2", "--gpus=8", "--cpus=13", "--", "python", "-m", "x y")
    done = launch("slurm.sh", *words, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    script = (tmp_path / "script").read_text()
    for line in ("--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8", "--cpus-per-task=13"):
        assert f"#SBATCH {line}\n" in script
    for line in ("--signal=TERM@120", "--requeue"):
        assert f"#SBATCH {line}\n" in script
    step = r"srun --cpus-per-task=13 --gpu-bind=none --kill-on-bad-exit=1 python -m x\ y"
    assert step in script


def test_jax_takes_one_gpu_in_each_process_of_a_slurm_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the variables of a process that srun started, JAX itself chooses the local GPU."""
    step = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[3-4]", "SLURM_NTASKS": "16"}
    for name, value in {**step, "SLURM_PROCID": "11", "SLURM_LOCALID": "3"}.items():
        monkeypatch.setenv(name, value)
    address, count, rank, devices = ClusterEnv.auto_detect_unset_distributed_params(
        None, None, None, None, None, None
    )
    assert (count, rank, devices) == (16, 11, [3])
    assert address is not None and address.startswith("n3:")


@pytest.mark.parametrize(
    ("ends", "requeued"),
    [
        ([(75, 0)] * 6, 4),
        ([(75, 5)] * 6, 4),
        # A new checkpoint, or a stop that has saved, and failures are counted from one.
        ([(75, step) for step in (5, 10, 15, 20, 25, 30)], 6),
        ([(75, 0), (75, 0), (143, 0), (75, 0), (75, 0), (75, 0), (75, 0)], 7),
        ([(0, 5)], 0),
        ([(1, 5)], 0),
    ],
)
def test_slurm_queues_a_job_again_until_it_fails_without_progress(
    tmp_path: Path, ends: list[tuple[int, int]], requeued: int
) -> None:
    words = ("--nodes=1", "--gpus=1", "--failures=5", "--", "true", "--workdir=runs/x")
    done = launch("slurm.sh", "--dry-run", *words)
    script = done.stdout.split("<<'END'\n")[1].rsplit("END\n")[0]
    # The job changes to this checkout; here it must stay in its own folder.
    script = "\n".join(line for line in script.splitlines() if not line.startswith("cd "))
    srun = "read -r status step < end; mkdir -p runs/x/checkpoints/$step; exit $status"
    for name, does in {"srun": srun, "scontrol": "echo $@ >> calls"}.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{does}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "PATH": path}
    for status, step in ends:
        (tmp_path / "end").write_text(f"{status} {step}\n")
        run = subprocess.run(
            ["bash", "-c", script], cwd=tmp_path, env=slurm, capture_output=True, text=True
        )
        assert run.returncode == status
    calls = tmp_path / "calls"
    assert (calls.read_text().splitlines() if calls.exists() else []) == ["requeue 7"] * requeued
    if len(set(ends)) == 1 and len(ends) == 6:
        assert "5 failures in a row" in run.stderr
        assert (tmp_path / "slurm-dsr-7.failures").read_text().count("n[1-2]") == 6


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


def test_local_processes_have_their_index_and_count() -> None:
    commands = printed("local.sh", "--processes=2", "--port=5", "--cpu-devices=4", "--", "a b", "c")
    assert [command[-2:] for command in commands] == [["a b", "c"]] * 2
    for rank, command in enumerate(commands):
        assert {
            *("DSR_COORDINATOR=127.0.0.1:5", "DSR_NUM_PROCESSES=2", f"DSR_PROCESS_ID={rank}"),
            *("JAX_PLATFORMS=cpu", "JAX_NUM_CPU_DEVICES=4"),
        } < set(command)
