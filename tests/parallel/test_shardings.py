"""Abstract state becomes shardings, and FSDP really splits the parameters."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dsr_jax.core.errors import MeshError
from dsr_jax.core.trees import flatten_names
from dsr_jax.models.dit import DIT, LightningDiT
from dsr_jax.parallel import shardings
from dsr_jax.parallel.axes import make_rules, make_update_rules
from dsr_jax.parallel.mesh import MeshShape, make_mesh
from dsr_jax.parallel.topologies import CHIPS, compile_only_devices, find_topology
from tests.requirements import require


def abstract(model: LightningDiT) -> object:
    x = jnp.zeros((1, model.input_size, model.input_size, model.in_channels))
    init = lambda key: model.init(key, x, jnp.zeros(1), jnp.zeros(1, int))  # noqa: E731
    return jax.eval_shape(init, jax.random.key(0))["params"]


def xl() -> LightningDiT:
    return LightningDiT(
        input_size=16, in_channels=768, num_classes=1000, num_registers=36, register_start=8,
        **DIT["XL"],
    )  # fmt: skip


@pytest.mark.parametrize("shape", [MeshShape(1, 8, 1), MeshShape(1, 2, 4), MeshShape(1, 4, 2)])
def test_fsdp_splits_most_bytes_of_xl(shape: MeshShape) -> None:
    boxed, mesh = abstract(xl()), make_mesh(shape)
    tree = shardings.make_shardings(boxed, make_rules("fsdp"), mesh)
    assert shardings.sharded_fraction(nn.unbox(boxed), tree) > 0.99
    shardings.check_sharded(nn.unbox(boxed), tree)
    specs = {name: sharding.spec for name, sharding in flatten_names(tree).items()}
    assert specs["blocks_reg/attn/qkv/kernel"] == P(None, "fsdp", None, "tensor", None)
    assert specs["blocks_pre/mlp/w3/kernel"] == P(None, "tensor", "fsdp")


@pytest.mark.parametrize("shape", [MeshShape(1, 8, 1), MeshShape(2, 2, 2)])
def test_zero1_splits_the_update_of_xl_and_no_width_of_its_parameters(shape: MeshShape) -> None:
    boxed, mesh = abstract(xl()), make_mesh(shape)
    params, update, fsdp = (
        shardings.make_shardings(boxed, rules, mesh)
        for rules in (make_rules("zero1"), make_update_rules("zero1"), make_rules("fsdp"))
    )
    assert shardings.sharded_fraction(nn.unbox(boxed), params) == 0
    assert shardings.sharded_fraction(nn.unbox(boxed), update) > 0.99
    assert update == fsdp
    tensor = flatten_names(params)["blocks_reg/attn/qkv/kernel"].spec
    assert tensor == P(None, None, None, "tensor", None)


def test_what_does_not_divide_stays_whole_and_is_named() -> None:
    model = LightningDiT(
        input_size=4, in_channels=3, num_classes=5, hidden_size=36, depth=1, num_heads=3
    )
    boxed, mesh = abstract(model), make_mesh(MeshShape(1, 8, 1))
    tree = shardings.make_shardings(boxed, make_rules("fsdp"), mesh)
    assert shardings.sharded_fraction(nn.unbox(boxed), tree) < 0.1
    with pytest.raises(MeshError, match="blocks/adaLN/kernel"):
        shardings.check_sharded(nn.unbox(boxed), tree)


def test_replicated_rules_split_the_batch_only() -> None:
    mesh = make_mesh(MeshShape(2, 2, 2))
    rules = make_rules("replicated")
    tree = shardings.make_shardings(abstract(xl()), rules, mesh)
    assert all(s.is_fully_replicated for s in jax.tree.leaves(tree))
    assert shardings.batch_sharding(mesh, rules).spec == P(("data", "fsdp", "tensor"))


SLICES = [
    pytest.param(name, marks=pytest.mark.slow if find_topology(name).num_chips > 64 else ())
    for name in (f"{kind}:{shape}" for kind, chip in CHIPS.items() for shape in chip.shapes)
]


@pytest.mark.tpu
@pytest.mark.parametrize("name", [*SLICES, "2xv5e:4x4"])
@pytest.mark.parametrize("preset", ["fsdp", "replicated"])
def test_rows_of_every_process_of_every_slice(name: str, preset: str) -> None:
    """Against the device that the mesh has at each place, counted by hand."""
    require("libtpu", "tpu")
    topology = find_topology(name)
    devices = compile_only_devices(topology)
    processes = sorted({device.process_index for device in devices})
    tensor = MeshShape(tensor=math.gcd(4, len(devices)))
    for shape in (MeshShape(), MeshShape(data=topology.slices, fsdp=-1), tensor):
        mesh = make_mesh(shape, devices)
        split = mesh.devices.size if preset == "replicated" else mesh.devices[..., 0].size
        size, wanted = 2 * split, {process: set() for process in processes}
        for place, device in enumerate(mesh.devices.flat):
            block = place if preset == "replicated" else place // mesh.shape["tensor"]
            wanted[device.process_index] |= {2 * block, 2 * block + 1}
        sharding = shardings.batch_sharding(mesh, make_rules(preset))
        for process in processes:
            rows = shardings.process_rows(sharding, size, process)
            assert rows.tolist() == sorted(wanted[process]), (shape, process)


@pytest.mark.tpu
@pytest.mark.parametrize("name", ["v5e:4x4", "v5e:4x8", "v4:2x2x4", "v4:4x4x4"])
def test_processes_alternate_on_real_slices(name: str) -> None:
    """Else the rows of a process would be one stretch, and the tests above could not fail."""
    require("libtpu", "tpu")
    mesh = make_mesh(MeshShape(), compile_only_devices(find_topology(name)))
    sharding = shardings.batch_sharding(mesh, make_rules("fsdp"))
    rows = [
        shardings.process_rows(sharding, mesh.size, process) for process in range(mesh.size // 4)
    ]
    assert any((np.diff(own) > 1).any() for own in rows)
    np.testing.assert_array_equal(np.sort(np.concatenate(rows)), np.arange(mesh.size))


def test_host_batches_become_global_arrays_and_come_back() -> None:
    mesh = make_mesh(MeshShape(4, 2, 1))
    sharding = shardings.batch_sharding(mesh, make_rules("fsdp"))
    batch = {"x": np.arange(16.0).reshape(8, 2), "y": np.arange(8)}
    placed = shardings.host_to_global(batch, sharding, 8)
    assert placed["x"].sharding == sharding
    for name, value in shardings.fetch(placed).items():
        np.testing.assert_array_equal(value, batch[name])


def test_a_batch_of_another_size_than_the_processes_rows_is_refused() -> None:
    sharding = shardings.batch_sharding(make_mesh(MeshShape()), make_rules("fsdp"))
    with pytest.raises(MeshError, match="'x' has 8 rows; process 0 holds 16 of a batch of 16"):
        shardings.host_to_global({"x": np.zeros((8, 2))}, sharding, 16)
    with pytest.raises(MeshError, match="batch of 12 rows does not divide"):
        shardings.process_rows(sharding, 12)


def test_results_under_other_indices_are_refused() -> None:
    shardings.check_row_order(np.arange(3, dtype=np.uint32), range(3), "scores")
    with pytest.raises(MeshError, match=r"scores: row 1 is the result of input 2.*2 of 3 rows"):
        shardings.check_row_order(np.array([0, 2, 1]), np.arange(3), "scores")
    with pytest.raises(MeshError, match="2 results for 3 inputs"):
        shardings.check_row_order(np.arange(2), np.arange(3), "scores")
