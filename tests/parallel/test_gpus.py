"""GPU nodes: names, limits, XLA's description of a card."""

import re

import pytest
from jaxlib import xla_client

from dsr_jax.core.errors import MeshError
from dsr_jax.parallel import gpus
from dsr_jax.parallel.gpus import CARDS, MEMORY_FRACTIONS, GpuTopology
from dsr_jax.parallel.topologies import compile_only_devices, find_topology
from dsr_jax.telemetry.flops import peak_flops


def find(name: str) -> GpuTopology:
    """GPUs by name."""
    topology = find_topology(name)
    assert isinstance(topology, GpuTopology)
    return topology


@pytest.mark.parametrize(
    ("name", "nodes", "chips", "node"),
    [
        ("h100:8", 1, 8, "8 x NVIDIA H100 80GB HBM3"),
        ("h200:1", 1, 1, "1 x NVIDIA H200"),
        ("2xa100:8", 2, 16, "8 x NVIDIA A100-SXM4-80GB"),
    ],
)
def test_names_are_nodes_and_gpus(name: str, nodes: int, chips: int, node: str) -> None:
    topology = find(name)
    assert (topology.name, topology.platform) == (name, "gpu")
    assert (topology.slices, topology.num_chips, topology.accelerator_type) == (nodes, chips, node)


@pytest.mark.parametrize("name", ["h100", "h100:3", "h100:16", "0xh100:8", "h100:2x4"])
def test_other_numbers_are_refused_with_those_that_there_are(name: str) -> None:
    with pytest.raises(MeshError, match=r"1, 2, 4, 8 GPUs.*2xh100:8"):
        find_topology(name)


def test_an_unknown_card_is_refused_with_the_known_ones() -> None:
    with pytest.raises(MeshError, match="a100:8, h100:8, h200:8"):
        find_topology("b100:8")


def test_advice_names_more_gpus_of_the_node_and_then_more_nodes() -> None:
    assert find("h100:2").larger[:3] == ("h100:4", "h100:8", "2xh100:8")
    assert find("2xh100:8").larger[0] == "4xh100:8"
    for name in find("h200:1").larger:
        assert find(name).name == name


@pytest.mark.parametrize("variable", MEMORY_FRACTIONS)
def test_a_program_has_what_jax_takes_of_the_memory(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """JAX reads either variable."""
    card = CARDS["h200"]
    for name in MEMORY_FRACTIONS:
        monkeypatch.delenv(name, raising=False)
    assert card.hbm_bytes == int(0.75 * card.memory_bytes)
    monkeypatch.setenv(variable, "0.92")
    assert card.hbm_bytes == int(0.92 * card.memory_bytes)
    assert xla_client.generate_pjrt_gpu_plugin_options()["memory_fraction"] == 0.92
    for wrong in ("92", "0", "most"):
        monkeypatch.setenv(variable, wrong)
        with pytest.raises(MeshError, match=f"^{variable}=.*\n.*{variable}=0.92"):
            card.hbm_bytes  # noqa: B018


def test_cards_are_described_to_xla_as_the_table_has_them() -> None:
    for card in CARDS.values():
        numbers = dict(re.findall(r"(\w+): ([\d.e+]+)", card.target_config))
        assert int(numbers["device_memory_size"]) == card.memory_bytes
        assert int(numbers["memory_bandwidth"]) == card.hbm_bandwidth
        assert int(numbers["core_count"]) == card.cores
        assert f'device_description_str: "{card.device_kind}"' in card.target_config
        assert peak_flops(card.device_kind) == card.peak_flops


def test_bfloat16_peaks_follow_from_units_and_clock() -> None:
    """A multiprocessor of an A100 has 1,024 bfloat16 multiply-adds a clock, a later one 2,048."""
    for card in CARDS.values():
        rate = 1024 if card.capability == 8 else 2048
        at_highest_clock = 2 * rate * card.cores * card.clock_ghz * 1e9
        # Data sheets of later cards state a lower clock for matmuls.
        assert 0.9 < card.peak_flops / at_highest_clock < 1.01


def test_without_the_plugin_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MeshError, match=r"pip install 'dsr_jax\[cuda\]'"):
        compile_only_devices(find_topology("h100:8"))
