"""Shared behavior of training commands: device errors and their remedies."""

import re
from pathlib import Path

import jax
import pytest

from dsr_jax import config as configs
from dsr_jax.config.resume import compare_configs
from dsr_jax.core.errors import DeviceMemoryError
from dsr_jax.runs.runner import explain_out_of_memory

DIGITS = str(Path(__file__).parents[2] / "configs" / "digits.py")


def test_a_device_without_memory_names_what_to_change() -> None:
    """Each key that it names exists, and a run that continues takes it."""
    text = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 68719476736 bytes.\nmore"
    with pytest.raises(DeviceMemoryError, match="68719476736 bytes.\n  ->") as caught:
        with explain_out_of_memory():
            raise jax.errors.JaxRuntimeError(text)
    named = set(re.findall(r"config\.([a-z_]+\.[a-z_]+)", caught.value.remedy))
    changes = (
        *("model.remat=full", "decoder.remat=full", "optim.accumulate=2", "mesh.fsdp=2"),
        *("sharding.rules=fsdp", "precision.compute=bfloat16"),
        *("sample.batch=8", "eval.batch=8"),
    )
    assert named == {change.partition("=")[0] for change in changes}
    before = configs.load(DIGITS, ["--config.sharding.rules=zero1"])
    after = configs.load(
        DIGITS, ["--config.sharding.rules=zero1", *(f"--config.{change}" for change in changes)]
    )
    found = compare_configs(configs.to_json(before), after)
    assert set(found.free) == named and not found.ask and not found.never


def test_other_errors_of_devices_stay_as_they_are() -> None:
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), explain_out_of_memory():
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")
