"""Errors for the user are a screen of text; bugs keep their traceback."""

import pytest

from dsr_jax.core.cli import run_main
from dsr_jax.core.errors import ConfigError


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
