"""Fakes of gcloud, kubectl, xpk, sbatch and srun, in a separate folder.

Run as `python imitation.py PROGRAM ARGUMENTS...`. Every flag must be one that the real program has
(`recorded_flags.json`). What a launcher does to a slice happens to its imitation: `workers/N` is
the home of worker N, `buckets/NAME` a bucket, `image` the content of a container, `slice` the state
of the queued slice. Commands for workers are run there; those in `silent` do not answer.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FLAGS = json.loads(Path(__file__).with_name("recorded_flags.json").read_text())
FOLDER = Path(os.environ.get("IMITATION", "/nonexistent"))

WORKER_PROGRAMS = {
    "sudo": 'exec "$@"',
    "fuser": "exit 1",
    "apt-get": "exit 0",
    "hostname": 'basename "$HOME"',
    "mountpoint": '[ -L "$2" ]',
    # gcsfuse --implicit-dirs BUCKET FOLDER
    "gcsfuse": 'rmdir "$3" && ln -s "$IMITATION/buckets/$2" "$3"',
    # Buckets without a hierarchical namespace have no folders to rename.
    "mv": '[ -f "$IMITATION/flat" ] && [ -d "$1" ] && exit 1; exec /bin/mv "$@"',
    # python3.11 -m venv FOLDER, in which python is the test's own job.
    "python3.11": (
        'mkdir -p "$3/bin" && ln -sf "$IMITATION/job" "$3/bin/python" && '
        'printf "#!/bin/sh\\nexit 0\\n" > "$3/bin/pip" && chmod +x "$3/bin/pip"'
    ),
}


def make(folder: Path, workers: int = 2) -> Path:
    """Makes a folder with the programs and a slice; returns the programs' folder, for PATH."""
    programs = folder / "programs"
    programs.mkdir(parents=True)
    for name in ("gcloud", "kubectl", "xpk", "sbatch", "srun", "scontrol"):
        _write(programs / name, f'exec {sys.executable} -I -S {__file__} {name} "$@"')
    _write(programs / "sleep", 'echo "$1" >> "$IMITATION/sleeps"')
    (folder / "worker_programs").mkdir()
    for name, does in WORKER_PROGRAMS.items():
        _write(folder / "worker_programs" / name, does)
    for number in range(workers):
        (folder / "workers" / str(number)).mkdir(parents=True)
    (folder / "slice").write_text("NONE\n")
    (folder / "calls").touch()
    return programs


def _write(path: Path, does: str) -> None:
    path.write_text(f"#!/bin/bash\n{does}\n")
    path.chmod(0o755)


def check(words: list[str]) -> tuple[str, list[str], dict[str, str]]:
    """Splits a command line into the recorded command, its other words and its flags.

    Raises:
      SystemExit: If the real program has no such command, or the command no such flag.
    """
    ends = [end for end in range(len(words), 0, -1) if " ".join(words[:end]) in FLAGS]
    if not ends or words == ["gcloud"]:
        sys.exit(f"not a recorded command: {' '.join(words)}")
    command, rest = " ".join(words[: ends[0]]), words[ends[0] :]
    known = set(FLAGS[command].split())
    if command.startswith("gcloud"):
        known |= set(FLAGS["gcloud"].split())
    others, flags = [], {}
    for number, word in enumerate(rest):
        if command == "srun" and not word.startswith("-"):
            others = rest[number:]
            break
        if word.startswith("-"):
            name, _, value = word.partition("=")
            if name not in known:
                sys.exit(f"{command}: unrecognized arguments: {name}")
            flags[name] = value
        else:
            others.append(word)
    return command, others, flags


def chosen_workers(which: str) -> list[Path]:
    homes = sorted((FOLDER / "workers").iterdir())
    return homes if which == "all" else [homes[int(which)]]


def silent(home: Path) -> bool:
    file = FOLDER / "silent"
    return file.exists() and home.name in file.read_text().split()


def on_worker(home: Path, command: str) -> subprocess.CompletedProcess[str]:
    path = f"{FOLDER / 'worker_programs'}:/usr/bin:/bin:/usr/sbin:/sbin"
    return subprocess.run(
        ["bash", "-c", command],
        env={"HOME": str(home), "PATH": path, "IMITATION": str(FOLDER)},
        cwd=home,
        capture_output=True,
        text=True,
    )


def ssh(flags: dict[str, str]) -> int:
    homes = chosen_workers(flags["--worker"])
    if any(map(silent, homes)):
        print("ERROR: connection timed out", file=sys.stderr)
        return 255
    with ThreadPoolExecutor() as pool:
        done = list(pool.map(lambda home: on_worker(home, flags["--command"]), homes))
    for one in done:
        sys.stdout.write(one.stdout)
        sys.stderr.write(one.stderr)
    return max(one.returncode for one in done)


def take_away() -> None:
    """The machines of the slice are gone: their processes, and their disks."""
    for home in sorted((FOLDER / "workers").iterdir()):
        if (home / "job.pid").exists():
            try:
                group = os.getpgid(int((home / "job.pid").read_text()))
                if group != os.getpgid(0):
                    os.killpg(group, signal.SIGKILL)
            except (ProcessLookupError, ValueError):
                pass
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(exist_ok=True)
    (FOLDER / "silent").unlink(missing_ok=True)


def act(command: str, others: list[str], flags: dict[str, str]) -> int:
    """What the command does to the imitated project; returns its exit status."""
    match command.split():
        case ["gcloud", *_, "queued-resources", "create"]:
            take_away()
            refused = (FOLDER / "refuse").exists()
            (FOLDER / "slice").write_text("FAILED\n" if refused else "ACTIVE\n")
        case ["gcloud", *_, "queued-resources", "delete"]:
            take_away()
            (FOLDER / "slice").write_text("NONE\n")
        case ["gcloud", *_, "queued-resources", "describe"]:
            state = (FOLDER / "slice").read_text().strip()
            if state == "NONE":
                print("ERROR: NOT_FOUND: no such resource", file=sys.stderr)
                return 1
            print(state)
        case ["gcloud", *_, "scp"]:
            for home in chosen_workers(flags["--worker"]):
                shutil.copy(others[0], home / others[1].partition(":")[2])
        case ["gcloud", *_, "ssh"]:
            return ssh(flags)
        case ["gcloud", "storage", "ls"]:
            folder = FOLDER / "buckets" / others[0].removeprefix("gs://")
            if not folder.is_dir():
                print("ERROR: One or more URLs matched no objects.", file=sys.stderr)
                return 1
            for path in sorted(folder.iterdir()):
                print(f"{others[0]}{path.name}{'/' if path.is_dir() else ''}")
        case ["gcloud", "storage", "cp"]:
            *sources, target = others
            for source in sources:
                folder = FOLDER / "buckets" / target.removeprefix("gs://") / Path(source).name
                shutil.copytree(source, folder, dirs_exist_ok=True)
        case ["xpk", "workload", "create"]:
            shutil.copytree(flags["--script-dir"], FOLDER / "image", dirs_exist_ok=True)
        case ["sbatch"]:
            script = sys.stdin.read()
            (FOLDER / "script").write_text(script)
            for line in script.splitlines():
                if line.startswith("#SBATCH "):
                    check(["sbatch", line.removeprefix("#SBATCH ")])
                elif line.startswith("srun "):
                    check(["srun", *line.split()[1:]])
    return 0


def main(words: list[str]) -> int:
    command, others, flags = check(words)
    with (FOLDER / "calls").open("a") as calls:
        calls.write(json.dumps([command, *others, *(f"{k}={v}" for k, v in flags.items())]) + "\n")
    return act(command, others, flags)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
