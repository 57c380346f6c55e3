"""The documentation's commands parse, its files exist, its code runs."""

import argparse
import ast
import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from dsr_jax import config as configs

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("**/*.md"), ROOT / "launch" / "README.md"]
)
SOURCES = sorted(
    [*ROOT.glob("dsr_jax/*.py"), *ROOT.glob("tools/**/*.py"), *ROOT.glob("configs/*.py")]
)
# Stands for a config of the reader's.
OWN = "configs/x.py"


def blocks(language: str) -> list[tuple[Path, str]]:
    """All fenced blocks of a language."""
    fence = re.compile(rf"^ *```{language}\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
    return [(page, code) for page in PAGES for code in fence.findall(page.read_text())]


def python_commands(text: str) -> list[str]:
    """This project's commands in lines for a shell, those behind a launcher's "--" included."""
    lines = re.sub(r" *\\\n *", " ", text).splitlines()
    parts = [part for line in lines for part in re.split(r"&&| -- (?=python )", line)]
    # Variables of the environment may stand before a command.
    commands = [re.sub(r"^(\w+=\S+ )+", "", part.split(" #")[0].strip()) for part in parts]
    return [one for one in commands if re.match("python (?!-m venv)", one)]


def docstring_commands(path: Path) -> list[str]:
    """Commands in the indented lines of a module's docstring, without what is optional."""
    text = ast.get_docstring(ast.parse(path.read_text()), clean=False) or ""
    lines = re.sub(r" *\\\n *", " ", text).splitlines()
    commands = python_commands("\n".join(line for line in lines if line.startswith("    ")))
    return [re.sub(r" *\[.*\]", "", command) for command in commands]


PLANS = {
    path.parent.name: json.loads(path.read_text()) for path in ROOT.glob("docs/plans/*/*.json")
}

COMMANDS = sorted(
    {
        *(command for _, code in blocks("bash") for command in python_commands(code)),
        *(command for path in SOURCES for command in docstring_commands(path)),
        *(plan["command"] for plan in PLANS.values()),
    }
)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command: str, own_modules: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(own_modules)
    words = shlex.split(command)[1:]
    if words[0] == "-m":
        assert words[1].startswith("dsr_jax"), command
        name, arguments = words[1], words[2:]
        name = f"{name}.__main__" if (ROOT / name.replace(".", "/")).is_dir() else name
    else:
        assert (ROOT / words[0]).is_file(), command
        name, arguments = words[0].removesuffix(".py").replace("/", "."), words[1:]
    overrides = [word for word in arguments if word.startswith("--config.")]
    arguments = [word for word in arguments if not word.startswith("--config.")]

    class Parsed(Exception):
        """The command line was understood; nothing needs to run."""

    parse = argparse.ArgumentParser.parse_known_args
    found: list[argparse.Namespace] = []
    depth = 0

    def stop(self: argparse.ArgumentParser, args=None, namespace=None):  # noqa: ANN001, ANN202
        nonlocal depth
        depth += 1
        try:
            known, unknown = parse(self, args, namespace)
        finally:
            depth -= 1
        if depth:
            return known, unknown  # A subcommand's own parser.
        assert not unknown, f"{command}: {unknown}"
        found.append(known)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
    module = importlib.import_module(name)
    with pytest.raises(Parsed):
        module.main(arguments)
    config = getattr(found[0], "config", None)
    if config and config != OWN:
        name, colon, argument = config.partition(":")
        path = next(folder / name for folder in (ROOT, own_modules) if (folder / name).exists())
        assert configs.load(f"{path}{colon}{argument}", overrides)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_tables_quote_their_plans() -> None:
    quoted = set()
    for page in PAGES:
        for row in re.findall(r"^\|.*plans/.*\|$", page.read_text(), re.MULTILINE):
            name = re.findall(r"plans/(\w+)/report\.json", row)[-1]
            plan = PLANS[name]
            times = [
                *(
                    sum(part[f"{kind}_seconds"] for part in plan["parts"])
                    for kind in ("compute", "hbm", "ici")
                ),
                plan["step_seconds_estimate"],
            ]
            # Long steps are quoted in seconds.
            scale, digits, unit = (1, 2, "s") if times[-1] > 0.5 else (1e3, 0, "ms")
            *resources, step = [f"{scale * time:.{digits}f}" for time in times]
            memory, limit = (plan[key] / 2**30 for key in ("hbm_bytes_per_chip", "hbm_limit_bytes"))
            cells = [cell.strip() for cell in row.split("|")]
            for expected in (
                f"{memory:.2f} of {limit:.2f} GiB",
                f"{', '.join(resources)} {unit}",
                f"{step} {unit}",
                f"{plan['mfu_bound']:.0%}",
            ):
                assert expected in cells, row
            for days in (cell for cell in cells if " days" in cell):
                assert days.startswith(f"{plan['days']:.2f} days"), row
                assert "-hours" not in days or f", {plan['chip_hours']:,.0f} " in days, row
            quoted.add(name)
    assert quoted == set(PLANS)


@pytest.fixture(scope="session")
def own_modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that pages show: blocks that begin with a comment `# name.py`."""
    folder = tmp_path_factory.mktemp("own_modules")
    for _, code in blocks("python"):
        if name := re.match(r"# (\w+\.py)\n", code):
            (folder / name[1]).write_text(code)
    return folder


@pytest.mark.parametrize(("page", "code"), blocks("python"), ids=lambda x: getattr(x, "name", ""))
def test_code_runs(
    page: Path,
    code: str,
    own_modules: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(own_modules)
    exec(compile(code, str(page), "exec"), {"__name__": "__docs__"})
    printed = capsys.readouterr().out.split("\n")
    promised = re.findall(r"print\(.*\)  # (.*)", code)
    assert printed[: len(promised)] == promised


def test_the_readme_opens_with_its_two_commands() -> None:
    code = [block for page, block in blocks("bash") if page.name == "README.md"]
    assert code[0].startswith("pip install -e . -c constraints.txt && python -m dsr_jax.train")
    assert code[1].strip() == "pip install -e '.[test]' -c constraints.txt && pytest"
    assert sys.version_info >= (3, 11)
