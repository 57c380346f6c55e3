"""Test-time registers against a plain loop over images, tokens and units."""

from typing import Any

import jax
import numpy as np
import pytest

from dsr_jax.core.errors import ConfigError
from dsr_jax.models.intervention import Intervention

BATCH, ROWS, UNITS, REGISTERS = 3, 9, 7, 2
LISTED = [1, 4, 5]


def loop(
    a: np.ndarray, *, normal: str, shared: bool, spare: bool, scale: tuple[float, ...]
) -> np.ndarray:
    """The definition, image by image."""
    out = a.copy()
    for image in range(BATCH):
        for unit in LISTED:
            read = a[image][:, LISTED] if shared else a[image][:, [unit]]
            high, low = read.max(), read.min()
            value = high if abs(high) >= abs(low) else low
            patches = slice(int(spare), ROWS - REGISTERS)
            column = a[image, patches, unit]
            if normal == "zero":
                out[image, patches, unit] = 0
            elif normal == "mean":
                out[image, patches, unit] = column.mean()
            elif normal == "only_outliers":
                large = column > column.mean() + column.std(ddof=1)
                out[image, patches, unit] = np.where(large, column.mean(), column)
            for register in range(REGISTERS):
                out[image, ROWS - REGISTERS + register, unit] = scale[register] * value
    return out


@pytest.mark.parametrize("normal", ["zero", "mean", "only_outliers", "same"])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("spare", [True, False])
def test_equals_the_definition(normal: str, shared: bool, spare: bool) -> None:
    a = np.random.default_rng(0).standard_normal((BATCH, ROWS, UNITS)).astype(np.float32)
    a[1, 3, 4] = -9  # The maximum keeps its sign.
    mask = np.zeros(UNITS, bool)
    mask[LISTED] = True
    intervention = Intervention(
        mask=mask,
        num_registers=REGISTERS,
        scale=(1.0, 0.5),
        normal_values=normal,
        shared_maximum=shared,
        spare_first_token=spare,
    )
    want = loop(a, normal=normal, shared=shared, spare=spare, scale=(1.0, 0.5))
    np.testing.assert_allclose(jax.jit(Intervention.__call__)(intervention, a), want, rtol=1e-5)


def test_the_positive_value_wins_a_tie() -> None:
    a = np.zeros((1, 4, 2), np.float32)
    a[0, 1, 0], a[0, 2, 0] = -3, 3
    out = np.asarray(Intervention(mask=np.array([True, False]))(a))
    assert out[0, -1, 0] == 3


def test_without_marked_units_nothing_changes() -> None:
    a = np.random.default_rng(0).standard_normal((2, 5, 3)).astype(np.float32)
    np.testing.assert_array_equal(Intervention(mask=np.zeros(3, bool))(a), a)


def test_registers_are_zeros_behind_the_tokens() -> None:
    tokens = np.ones((2, 3, 4), np.float32)
    out = np.asarray(Intervention(mask=np.zeros(3, bool), num_registers=2).append_registers(tokens))
    assert out.shape == (2, 5, 4) and not out[:, 3:].any() and out[:, :3].all()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"num_registers": 0}, "num_registers=0"),
        ({"normal_values": "nothing"}, "normal_values='nothing'"),
        ({"scale": (1.0, 2.0)}, "scale="),
    ],
)
def test_impossible_settings_are_named(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        Intervention(mask=np.zeros(3, bool), **changes)
