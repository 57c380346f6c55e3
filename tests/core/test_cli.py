"""User errors are printed without a traceback; bugs keep theirs."""

import subprocess
import sys

import pytest

from dsr_jax.core import cli
from dsr_jax.core.cli import count, make_parser, positive_int, run_main
from dsr_jax.core.errors import ConfigError, ProcessError


@pytest.fixture(autouse=True)
def this_process_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The end that a failed command sets itself must not end pytest."""
    monkeypatch.setattr(cli, "END_SECONDS", 1e6)


def test_user_errors_exit_with_two(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> int:
        raise ConfigError("config.optim.lr=-1", "it must be positive")

    with pytest.raises(SystemExit) as stop:
        run_main(main)
    assert stop.value.code == 2
    shown = capsys.readouterr().err
    assert "ConfigError: config.optim.lr=-1" in shown and "-> it must be positive" in shown
    assert "Traceback" not in shown


def test_bugs_are_not_hidden() -> None:
    def main() -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_main(main)


def test_an_error_has_its_own_status() -> None:
    def main() -> int:
        raise ProcessError("process 1 is lost")

    with pytest.raises(SystemExit) as stop:
        run_main(main)
    assert stop.value.code == 75


@pytest.mark.parametrize(
    ("error", "status"), [("StuckSaveError", 2), ("ProcessError", 75), ("ZeroDivisionError", 1)]
)
def test_a_failed_command_ends_whatever_its_threads_wait_for(error: str, status: int) -> None:
    """Python would join the thread, and the executor's, before it ends."""
    code = (
        "import concurrent.futures, threading\n"
        "from dsr_jax.core import cli\n"
        "from dsr_jax.core.errors import *\n"
        "cli.END_SECONDS = 0.2\n"
        "def main():\n"
        "    threading.Thread(target=threading.Event().wait).start()\n"
        "    concurrent.futures.ThreadPoolExecutor().submit(threading.Event().wait)\n"
        f"    raise {error}('saving step 4 has not ended')\n"
        "cli.run_main(main)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == status
    assert f"{error}: saving step 4 has not ended" in done.stderr


def test_paths_may_begin_with_the_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shells leave it alone behind an equals sign."""
    monkeypatch.setenv("HOME", "/home/somebody")
    parser = make_parser(None)
    parser.add_argument("--workdir")
    parser.add_argument("--out")
    args, rest = parser.parse_known_args(
        ["--workdir=~/runs/a", "--out=runs/~a", "--config.data.root=~/images", "--x=~other/y"]
    )
    assert (args.workdir, args.out) == ("/home/somebody/runs/a", "runs/~a")
    assert rest == ["--config.data.root=/home/somebody/images", "--x=~other/y"]


def test_help_names_defaults_and_keeps_the_description() -> None:
    parser = make_parser("Title.\n\n    a command line", "python -m dsr_jax.x")
    add = parser.add_argument
    add("file", help="what to read")
    add("--batch", type=positive_int, default=64, help="images at a time")
    add("--out", help="new file")
    add("--ema", default="", help="which weights; default: the config's")
    add("--grid", action="store_true", help="write a picture")
    add("--config", required=True, default="x", help="config file")
    lines = parser.format_help().splitlines()
    assert "    a command line" in lines and lines[0].startswith("usage: python -m dsr_jax.x")
    assert [line.split("  ")[-1] for line in lines if "efault" in line] == [
        "images at a time (default: 64)",
        "which weights; default: the config's",
    ]


def test_help_of_subcommands_names_defaults() -> None:
    parts = make_parser(None).add_subparsers()
    part = parts.add_parser("statistics")
    part.add_argument("--save-every", default=100, help="batches between savings")
    part.add_argument("--tensor", action="append", default=[], help="may be repeated")
    text = " ".join(part.format_help().split())
    assert "batches between savings (default: 100)" in text and text.endswith("may be repeated")


@pytest.mark.parametrize(
    ("text", "problem"), [("0", "not positive"), ("-4", "not positive"), ("x", "whole")]
)
def test_counts_are_positive(text: str, problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = make_parser(None)
    parser.add_argument("--batch", type=positive_int, default=64)
    assert parser.parse_args(["--batch", "7"]).batch == 7
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(["--batch", text])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "argument --batch" in error and problem in error


@pytest.mark.parametrize(("text", "problem"), [("-1", "negative: give 0 or more"), ("x", "whole")])
def test_counts_may_be_zero(text: str, problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = make_parser(None)
    parser.add_argument("--stop-after", type=count, default=0)
    assert parser.parse_args(["--stop-after", "0"]).stop_after == 0
    with pytest.raises(SystemExit):
        parser.parse_args(["--stop-after", text])
    assert problem in capsys.readouterr().err
