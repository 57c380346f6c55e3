"""Memory by purpose, out-of-memory messages, and advice."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dsr_jax.parallel.gpus import CARDS, MEMORY_FRACTIONS
from dsr_jax.parallel.mesh import MeshShape, make_mesh
from dsr_jax.planning.memory import (
    GIB,
    TEMPORARIES,
    Layout,
    advice,
    bytes_per_chip,
    gpu_advice,
    memory_parts,
    out_of_memory,
)

LAYOUT = Layout(
    mesh={"data": 256, "fsdp": 1, "tensor": 1},
    width=1152,
    remat="none",
    batch_per_chip=16,
    accumulate=1,
    state_bytes=11 * GIB,
    slices=("v5p:8x8x8",),
)


def test_bytes_per_chip_are_those_of_a_shard() -> None:
    mesh = make_mesh(MeshShape(data=1, fsdp=8))
    split = NamedSharding(mesh, PartitionSpec("fsdp"))
    whole = NamedSharding(mesh, PartitionSpec())
    tree = {
        "split": jax.ShapeDtypeStruct((16, 4), jnp.float32, sharding=split),
        "whole": jax.ShapeDtypeStruct((3,), jnp.bfloat16, sharding=whole),
    }
    assert bytes_per_chip(tree) == 2 * 4 * 4 + 3 * 2


def test_parts_add_up_to_the_compilers_total() -> None:
    analysis = SimpleNamespace(
        argument_size_in_bytes=110,
        output_size_in_bytes=95,
        alias_size_in_bytes=90,
        temp_size_in_bytes=1000,
        generated_code_size_in_bytes=7,
    )
    parts = memory_parts(analysis, {"parameters": 60, "EMA": 40, "batch": 0})
    assert parts == {
        **{"parameters": 60, "EMA": 40, "padding of arguments": 10, TEMPORARIES: 1000},
        **{"results": 5, "program": 7},
    }


@pytest.mark.parametrize(
    ("message", "needed"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. "
            "Exceeded hbm capacity by 4.75G.",
            20.5,
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (770.00G) exceeds available HBM (15.75G).",
            770 + 2,
        ),
    ],
)
def test_both_of_the_compilers_out_of_memory_messages_are_parsed(
    message: str, needed: float
) -> None:
    assert out_of_memory(message, 2 * GIB) == (int(needed * GIB), int(15.75 * GIB))


@pytest.mark.parametrize("message", ["INVALID_ARGUMENT: 3.0G", "RESOURCE_EXHAUSTED: of patience"])
def test_other_errors_are_left_alone(message: str) -> None:
    assert out_of_memory(message, 0) is None


def test_advice_names_a_split_that_divides_and_suffices() -> None:
    """1152 has no divisor 256."""
    found = advice(LAYOUT, 20 * GIB, 16 * GIB, temporaries=8 * GIB)
    assert "--config.mesh.fsdp=2 " in found[0] and "5.50 GiB" in found[0]
    assert "; enough: about" in found[0]
    tight = advice(LAYOUT, int(26.5 * GIB), 16 * GIB, temporaries=8 * GIB)
    assert "--config.mesh.fsdp=32 " in tight[0]
    hopeless = advice(LAYOUT, 100 * GIB, 16 * GIB, temporaries=80 * GIB)
    assert "--config.mesh.fsdp=128 " in hopeless[0] and "not enough by itself" in hopeless[0]


def test_advice_names_the_micro_batches_that_suffice() -> None:
    (line,) = (x for x in advice(LAYOUT, 24 * GIB, 16 * GIB, 12 * GIB) if "accumulate" in x)
    # 12 GiB stay, and 12 GiB of temporaries become 3.
    assert "--config.optim.accumulate=4 " in line and "; enough: about 15.00 GiB" in line
    (line,) = (x for x in advice(LAYOUT, 24 * GIB, 4 * GIB, 12 * GIB) if "accumulate" in x)
    assert "not enough by itself" in line


def test_advice_leaves_out_what_is_done_already() -> None:
    def words(**changes: object) -> str:
        layout = Layout(**{**vars(LAYOUT), **changes})
        return " ".join(advice(layout, 20 * GIB, 16 * GIB, temporaries=8 * GIB))

    assert "remat=dots" in words() and "remat=full" in words()
    assert "remat=dots" not in words(remat="dots") and "remat=full" in words(remat="dots")
    assert "remat" not in words(remat="full")
    assert "--config.optim.accumulate=4" in words(accumulate=2)
    assert "accumulate" not in words(batch_per_chip=1)
    assert "--config.sample.batch=2048" in words(accumulate=0)
    assert "fsdp" not in words(mesh={"data": 1, "fsdp": 128, "tensor": 1})
    assert "v5p:8x8x8" in words() and "--topology" not in words(slices=())


def test_advice_names_the_fraction_of_a_gpus_memory_that_jax_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in MEMORY_FRACTIONS:
        monkeypatch.delenv(name, raising=False)
    card = CARDS["h200"]
    (line,) = gpu_advice(card, 120 * GIB)
    assert f"{MEMORY_FRACTIONS[0]}=0.95; enough: about 120.00 GiB of 133.38 GiB" in line
    assert "not enough by itself" in gpu_advice(card, 140 * GIB)[0]
    # JAX refuses both variables at once.
    monkeypatch.setenv(MEMORY_FRACTIONS[1], "0.5")
    assert f"{MEMORY_FRACTIONS[1]}=0.95" in gpu_advice(card, 120 * GIB)[0]
    monkeypatch.setenv(MEMORY_FRACTIONS[1], "0.95")
    assert gpu_advice(card, 140 * GIB) == []
