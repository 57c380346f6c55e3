"""launch/README.md: its commands, flags and files exist, and runs fit their slices."""

import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from dsr_jax import config as configs
from dsr_jax.config.schema import leaves
from dsr_jax.core.files import read_json
from dsr_jax.parallel.topologies import CHIPS, Topology
from tests.launch import imitation
from tests.requirements import require

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "launch" / "README.md"


def commands() -> list[list[str]]:
    """Every command of the page, in order, as words; "&&" divides two."""
    blocks = re.findall(r"^ *```bash\n(.*?)```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    parts = [part for line in lines for part in line.split("&&")]
    return [shlex.split(part) for part in parts if part.strip()]


@dataclass(frozen=True)
class Run:
    """A training command on the page, and the slice that it runs on, if it is one."""

    script: str
    options: tuple[str, ...]
    job: tuple[str, ...]
    accelerator: str

    @property
    def config(self) -> str:
        return next(w.partition("=")[2] for w in self.job if w.startswith("--config="))

    @property
    def overrides(self) -> list[str]:
        return [word for word in self.job if word.startswith("--config.")]

    @property
    def settings(self) -> tuple[str, ...]:
        """What the compiled program depends on: not files."""
        files = ("--config.space.", "--config.data.root", "--config.data.source")
        return (self.config, *(w for w in self.overrides if not w.startswith(files)))


def runs() -> list[Run]:
    found, created = [], ""
    for words in commands():
        if not words[0].startswith("launch/"):
            continue
        kinds = [word.partition("=")[2] for word in words if word.startswith("--type=")]
        created = kinds[0] if kinds else created
        if "--" in words:
            where = words.index("--")
            on_tpu = "slurm" not in words[0] and "local" not in words[0]
            options = tuple(words[1:where])
            job = tuple(words[where + 1 :])
            found.append(Run(words[0], options, job, created if on_tpu else ""))
    return found


RUNS = runs()


def test_the_page_has_a_run_for_every_launcher() -> None:
    scripts = {f"launch/{path.name}" for path in (ROOT / "launch").glob("*.sh")}
    assert {run.script for run in RUNS} == scripts - {"launch/common.sh"}


LAUNCHES = [words for words in commands() if words[0].startswith("launch/")]


@pytest.mark.parametrize("words", LAUNCHES, ids=lambda words: " ".join(words[:2]))
def test_launchers_take_these_options_and_call_programs_with_flags_that_exist(
    words: list[str], tmp_path: Path
) -> None:
    programs = imitation.make(tmp_path)
    where = words.index("--") if "--" in words else len(words)
    done = subprocess.run(
        [str(ROOT / words[0]), *words[1:where], "--dry-run", *words[where:]],
        env={**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    if words[0] == "launch/slurm.sh":
        options = re.findall(r"^#SBATCH (.*)$", done.stdout, re.MULTILINE)
        (step,) = re.findall(r"^srun (.*)$", done.stdout, re.MULTILINE)
        printed = [["sbatch", *options], ["srun", *shlex.split(step)]]
    else:
        lexer = shlex.shlex(done.stdout, posix=True, punctuation_chars="\n")
        lexer.whitespace, lexer.whitespace_split = " ", True
        printed = [[]]
        for word in lexer:
            if set(word) == {"\n"}:
                printed.append([])
            else:
                printed[-1].append(word)
    checked = [
        line
        for line in printed
        if line and line[0] in ("gcloud", "xpk", "kubectl", "sbatch", "srun")
    ]
    assert checked or words[0] == "launch/local.sh"
    for line in checked:
        imitation.check(line)


def test_other_programs_have_these_flags() -> None:
    checked = [words for words in commands() if words[0] in ("gcloud", "kubectl", "xpk")]
    assert len(checked) >= 10
    for words in checked:
        imitation.check(words)


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which the page's own commands made, and copied, what they make and copy.

    Returns:
      The folder with `buckets/my-bucket` and `shared`.
    """
    imitation.make(tmp_path)
    monkeypatch.setattr(imitation, "FOLDER", tmp_path)
    here = tmp_path / "here"
    (tmp_path / "shared").mkdir()
    (tmp_path / "buckets").mkdir()
    here.mkdir()
    monkeypatch.chdir(here)
    for words in commands():
        if words[:2] == ["python", "-m"] and words[2] == "dsr_jax.convert":
            out = Path(words[words.index("--out") + 1])
            if out.suffix:
                out.parent.mkdir(parents=True, exist_ok=True)
                out.touch()
            else:
                out.mkdir(parents=True)
        elif words[:2] == ["python", "tools/prepare_imagenet.py"]:
            Path(words[3]).mkdir()
        elif words[:3] == ["gcloud", "storage", "cp"]:
            imitation.act(*imitation.check(words))
        elif words[:2] == ["cp", "-r"]:
            assert words[-1] == "/shared"
            for source in words[2:-1]:
                shutil.copytree(source, tmp_path / "shared" / source)
    return tmp_path


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.script)
def test_every_file_of_a_run_was_uploaded(run: Run, shared: Path) -> None:
    places = {
        "launch/queued.sh": ("~/bucket/", shared / "buckets" / "my-bucket"),
        "launch/tpu_vm.sh": ("~/bucket/", shared / "buckets" / "my-bucket"),
        "launch/xpk.sh": ("/bucket/", shared / "buckets" / "my-bucket"),
        "launch/slurm.sh": ("/shared/", shared / "shared"),
        "launch/local.sh": ("runs/", shared),
    }
    prefix, folder = places[run.script]
    words = [word for word in run.job if word.startswith("--workdir=")]
    assert words == [f"--workdir={words[0].partition('=')[2]}"]
    assert words[0].partition("=")[2].startswith(prefix)
    # The code, in the commit that is shipped.
    file = run.config.partition(":")[0]
    tracked = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", file], capture_output=True, text=True, check=True
    )
    assert tracked.stdout.strip() == file
    # Weights and data: every value that is a path, also where the config has it by default.
    config = configs.load(str(ROOT / run.config), run.overrides)
    paths = [(key, value) for key, value in leaves(config) if "/" in str(value)]
    for key, value in paths:
        assert value.startswith(prefix), f"config.{key}={value} is not uploaded"
        assert (folder / value.removeprefix(prefix)).exists(), f"config.{key}={value}"
    if "rae_dit" in file:
        read = {"data.root", "space.encoder", "space.decoder", "space.statistics"}
        assert {key for key, _ in paths} == read


def test_what_is_planned_is_what_is_run() -> None:
    (planned,) = [words for words in commands() if words[1:3] == ["-m", "dsr_jax.compile"]]
    queued = next(run for run in RUNS if run.script == "launch/queued.sh")
    config = next(word for word in planned if word.startswith("--config=")).partition("=")[2]
    overrides = [word for word in planned if word.startswith("--config.")]
    assert (config, *overrides) == queued.settings
    assert f"--topology={topology(queued.accelerator)}" in planned


def promised_memory() -> tuple[str, str]:
    """What the page says that a chip needs, and has, in GiB."""
    (found,) = re.findall(r"a chip needs,\s+([\d.]+) of ([\d.]+) GiB", PAGE.read_text())
    return found


def test_what_is_promised_is_what_was_planned() -> None:
    (file,) = re.findall(r"\(([./\w]+\.json)\)", PAGE.read_text())
    report = read_json(PAGE.parent / file)
    (planned,) = [words for words in commands() if words[1:3] == ["-m", "dsr_jax.compile"]]
    recorded = shlex.split(report["command"])
    assert sorted(planned) == sorted(word for word in recorded if not word.startswith("--out="))
    memory = [report[key] / 2**30 for key in ("hbm_bytes_per_chip", "hbm_limit_bytes")]
    assert promised_memory() == tuple(f"{one:.2f}" for one in memory)


def topology(accelerator: str) -> str:
    """The slice that an accelerator type is."""
    slices = [
        Topology(f"{chip.generation}:{shape}", chip, tuple(map(int, shape.split("x"))))
        for chip in CHIPS.values()
        for shape in chip.shapes
    ]
    return next(one.name for one in slices if one.accelerator_type == accelerator)


@functools.cache
def plan(settings: tuple[str, ...], accelerator: str, out: Path) -> dict:
    """The report of a run's own training step, compiled for its own slice."""
    config, *overrides = settings
    done = subprocess.run(
        [
            *(sys.executable, "-m", "dsr_jax.compile", f"--config={config}", f"--out={out}"),
            *(f"--topology={topology(accelerator)}", *overrides),
        ],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return read_json(out / "report.json")


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plans")


@pytest.mark.tpu
@pytest.mark.slow
@pytest.mark.parametrize(
    "run", [run for run in RUNS if run.accelerator], ids=lambda run: run.script
)
def test_a_run_fits_the_slice_that_it_rents(run: Run, plans: Path) -> None:
    require("libtpu", "tpu")
    name = re.sub(r"\W+", "_", json.dumps([run.settings, run.accelerator]))[:100]
    report = plan(run.settings, run.accelerator, plans / name)
    assert report["fits"]
    used = report["hbm_bytes_per_chip"] / 2**30
    if "rae_dit" in run.config:
        promised = promised_memory()
        # libtpu's versions differ by little.
        assert used == pytest.approx(float(promised[0]), rel=0.05)
        assert report["hbm_limit_bytes"] / 2**30 == pytest.approx(float(promised[1]), abs=0.01)
