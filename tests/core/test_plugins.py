"""Objects named as "package.module:name"."""

import pytest

from dsr_jax.core.errors import ConfigError
from dsr_jax.core.plugins import is_reference, load_object


def test_references_have_a_module_and_a_name() -> None:
    assert is_reference("module:name") and is_reference("package.module:name")
    for name in ("euler", "configs/x.py:arg", "module:", ":name", "C:\\x", "random:tiny-vit"):
        assert not is_reference(name), name


def test_objects_are_found_in_the_working_directory(tmp_path, monkeypatch) -> None:
    (tmp_path / "own_plugin.py").write_text("value = 3\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["/nowhere"] + __import__("sys").path)
    assert load_object("config.x", "own_plugin:value") == 3
    assert load_object("config.x", "math:pi") > 3


def test_errors_name_the_key_the_module_and_what_there_is() -> None:
    with pytest.raises(ConfigError, match="config.x='no_such_module:f'.*\n.*PYTHONPATH"):
        load_object("config.x", "no_such_module:f")
    with pytest.raises(ConfigError, match="module 'math' has no 'tau2'\n.*tau"):
        load_object("config.x", "math:tau2")
