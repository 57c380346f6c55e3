"""The list of all keys: python -m dsr_jax.config."""

import pytest

from dsr_jax.config.__main__ import format_keys, main
from dsr_jax.config.schema import SCHEMA
from dsr_jax.core.errors import ConfigError


def test_every_key_is_listed_with_default_and_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    lines = capsys.readouterr().out.splitlines()
    for name, key in SCHEMA.items():
        (line,) = [line for line in lines if line.startswith(f"{name} ")]
        assert repr(key.default) in line and key.meaning in line and key.change.value in line


def test_words_choose_keys() -> None:
    assert [line.split()[0] for line in format_keys(["clip_norm"]).splitlines()] == [
        "optim.clip_norm"
    ]
    with pytest.raises(ConfigError, match="no key contains unicorn"):
        format_keys(["unicorn"])


def test_help_shows_how_arguments_are_joined(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "configs/digits.py:runlocal --config.optim.lr=1e-3" in capsys.readouterr().out
