"""The batch of a sampling job by memory, for programs whose memory is known."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from dsr_jax.core.errors import DeviceMemoryError
from dsr_jax.sampling.batch import DEFAULT_BATCH, MAX_BATCH, find_batch, fixed_batch, whole_batch

FIXED, SAMPLE = 1000, 10
"""Bytes of a program: these, and so many for each sample."""


def compiler(most: int = 10**9) -> tuple[Callable[[int], Any], list[int]]:
    """Returns a compiler that gives up above a number of samples, and the batches it was given."""
    compiled = []

    def compile_for(batch: int) -> Any:
        compiled.append(batch)
        if batch > most:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        sizes = {
            "temp_size_in_bytes": FIXED + SAMPLE * batch,
            "argument_size_in_bytes": 10**6,
            "output_size_in_bytes": 0,
            "alias_size_in_bytes": 0,
            "generated_code_size_in_bytes": 0,
        }
        return SimpleNamespace(memory_analysis=lambda: SimpleNamespace(**sizes), batch=batch)

    return compile_for, compiled


@pytest.mark.parametrize(
    ("num", "devices", "samples", "size"),
    [
        (50_000, 1, 10**6, MAX_BATCH),
        (50_000, 1, 300, 256),
        (50_000, 1, 256, 256),
        (50_000, 1, 255, 128),
        (50_000, 8, 100, 64),
        (50_000, 1, 7, 4),
        (50_000, 24, 10**6, 1536),
        (100, 1, 10**6, 128),
        (3, 8, 10**6, 8),
    ],
)
def test_the_largest_batch_that_fits(num: int, devices: int, samples: int, size: int) -> None:
    compile_for, compiled = compiler()
    free = FIXED + SAMPLE * samples
    choice = find_batch(compile_for, num, devices, free)
    assert (choice.size, choice.program.batch) == (size, size)
    assert choice.allocated == FIXED + SAMPLE * size <= free
    assert str(choice).startswith(f"batch: {size} samples at once")
    assert len(compiled) == len(set(compiled)) <= (4 if samples >= DEFAULT_BATCH else 7)


def test_a_compiler_that_gives_up_is_asked_for_less() -> None:
    compile_for, compiled = compiler(most=200)
    assert find_batch(compile_for, 50_000, 1, 10**9).size == 128
    assert compiled == [64, 1024, 512, 256, 128]


def test_an_earlier_start_decides_where_its_batch_fits() -> None:
    compile_for, compiled = compiler()
    assert find_batch(compile_for, 50_000, 4, FIXED + SAMPLE * 300, kept=96).size == 96
    assert compiled == [96]
    assert find_batch(compile_for, 50_000, 4, FIXED + SAMPLE * 80, kept=96).size == 64
    # Another number of devices.
    assert find_batch(compile_for, 50_000, 5, FIXED + SAMPLE * 300, kept=96).size == 160


def test_nothing_fits() -> None:
    compile_for, _ = compiler()
    with pytest.raises(DeviceMemoryError, match="not even with one sample on each"):
        find_batch(compile_for, 50_000, 2, FIXED)


def test_errors_of_another_kind_are_not_memory() -> None:
    def compile_for(batch: int) -> Any:
        raise jax.errors.JaxRuntimeError("INTERNAL: of something else")

    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        find_batch(compile_for, 50_000, 1, FIXED)


def test_batches_without_a_choice() -> None:
    assert (fixed_batch(-1), fixed_batch(5)) == (DEFAULT_BATCH, 5)
    assert [whole_batch(count, 8) for count in (1, 8, 9)] == [8, 8, 16]
