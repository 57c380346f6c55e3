"""Files of register neurons: the published sets, round trips, and what is refused."""

from pathlib import Path

import numpy as np
import pytest

from dsr_jax.core.errors import ConfigError, DataError
from dsr_jax.models.variants import ENCODERS
from dsr_jax.registers.neurons import (
    PUBLISHED,
    load_neurons,
    neurons_to_mask,
    parse_neurons,
    published_neurons,
    save_neurons,
)


def test_published_sets_are_complete_and_fit_their_encoders() -> None:
    """Counts by block as the specification lists them (encoder 5), duplicates included."""
    counts = {
        "siglip2-base-patch16-256": {1: 2, 2: 3, 3: 10, 4: 16, 5: 19},
        "siglip2-so400m-patch14-224": {0: 2, 2: 3, 3: 2, 4: 3, 5: 3, 6: 3, 7: 3, 8: 4, 9: 56}
        | {14: 1, 17: 2, 20: 2, 24: 1, 25: 1, 26: 14},
    }
    assert set(counts) == set(PUBLISHED)
    distinct = {}
    for name, wanted in counts.items():
        neurons = published_neurons(f"google/{name}")
        assert {block: len(units) for block, units in neurons.items()} == wanted
        preset = ENCODERS[name]
        distinct[name] = int(neurons_to_mask(neurons, preset["depth"], preset["mlp_dim"]).sum())
    assert list(distinct.values()) == [50, 72]


def test_a_file_keeps_order_and_duplicates(tmp_path: Path) -> None:
    neurons = {2: [33, 9, 9], 0: [6]}
    save_neurons(tmp_path / "n.json", neurons)
    assert list(load_neurons(tmp_path / "n.json").items()) == list(neurons.items())
    assert load_neurons("siglip2-base-patch16-256") == published_neurons("siglip2-base-patch16-256")


@pytest.mark.parametrize(
    "text", ["nonsense", "[1]", '{"a": [1]}', '{"1": 2}', '{"1": [true]}', '{"-1": [2]}']
)
def test_other_content_is_refused_with_the_form(text: str) -> None:
    with pytest.raises(DataError, match="neurons.json") as caught:
        parse_neurons(text, "neurons.json")
    assert "units by block" in str(caught.value)


def test_what_lies_outside_the_encoder_is_named(tmp_path: Path) -> None:
    mask = neurons_to_mask({1: [3, 3, 0]}, 2, 4)
    np.testing.assert_array_equal(mask, [[0, 0, 0, 0], [1, 0, 0, 1]])
    with pytest.raises(ConfigError, match="block 2, but the encoder has blocks 0 to 1"):
        neurons_to_mask({2: [0]}, 2, 4)
    with pytest.raises(ConfigError, match="neuron 4 in block 0.*units 0 to 3"):
        neurons_to_mask({0: [4]}, 2, 4)
    with pytest.raises(DataError, match="does not exist"):
        load_neurons(tmp_path / "absent.json")
    with pytest.raises(ConfigError, match="dinov2-base"):
        published_neurons("dinov2-base")
