"""Abstract state becomes shardings, and FSDP really splits the parameters."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dsr_jax.core.errors import MeshError
from dsr_jax.core.trees import flatten_names
from dsr_jax.models.dit import LightningDiT
from dsr_jax.models.variants import DIT
from dsr_jax.parallel import shardings
from dsr_jax.parallel.axes import make_rules, make_update_rules
from dsr_jax.parallel.mesh import MeshShape, make_mesh


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


def test_host_batches_become_global_arrays_and_come_back() -> None:
    mesh = make_mesh(MeshShape(4, 2, 1))
    sharding = shardings.batch_sharding(mesh, make_rules("fsdp"))
    batch = {"x": np.arange(16.0).reshape(8, 2), "y": np.arange(8)}
    placed = shardings.host_to_global(batch, sharding)
    assert placed["x"].sharding == sharding
    for name, value in shardings.fetch(placed).items():
        np.testing.assert_array_equal(value, batch[name])
