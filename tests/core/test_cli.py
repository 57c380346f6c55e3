"""Errors for the user are a screen of text; bugs keep their traceback."""

import subprocess
import sys

import pytest

from dsr_jax.core.cli import run_main
from dsr_jax.core.errors import ConfigError, ProcessError


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


def test_a_save_that_does_not_end_is_not_waited_for() -> None:
    """Python would join the thread before it ends."""
    code = (
        "import threading\n"
        "from dsr_jax.core.cli import run_main\n"
        "from dsr_jax.core.errors import StuckSaveError\n"
        "def main():\n"
        "    threading.Thread(target=threading.Event().wait).start()\n"
        "    raise StuckSaveError('saving step 4 has not ended', 'look at the storage')\n"
        "run_main(main)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "StuckSaveError: saving step 4 has not ended\n  -> look at" in done.stderr
