"""The vocabulary of logical axes is checked: typos, collisions, missing rules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dsr_jax.core.errors import MeshError
from dsr_jax.parallel import axes
from dsr_jax.parallel.mesh import MeshShape, make_mesh


def test_presets_place_parameters_and_activations() -> None:
    rules = axes.make_rules("fsdp")
    assert axes.partition_spec(("embed", None, "heads", "head_dim"), rules) == P(
        "fsdp", None, "tensor", None
    )
    assert axes.partition_spec(("act_batch", "act_len"), rules) == P(("data", "fsdp"), None)


def test_unknown_names_raise_with_the_vocabulary() -> None:
    rules = axes.make_rules("fsdp")
    with pytest.raises(MeshError, match="'embd'.*\n.*embed"):
        axes.partition_spec(("embd",), rules)
    with pytest.raises(MeshError, match="'act_bacth'"):
        axes.Constrain(rules)(jnp.ones((2,)), "act_bacth")
    with pytest.raises(MeshError, match="unknown sharding rules 'fdsp'"):
        axes.make_rules("fdsp")
    with pytest.raises(MeshError, match="override for unknown logical axis 'mpl'"):
        axes.make_rules("fsdp", [("mpl", ("tensor",))])


def test_only_zero1_lays_the_update_out_by_itself() -> None:
    for name in ("fsdp", "replicated"):
        assert axes.make_update_rules(name) == axes.make_rules(name)
    assert axes.partition_spec(("embed", "mlp"), axes.make_rules("zero1")) == P(None, "tensor")
    rules = axes.make_update_rules("zero1", [("mlp", ())])
    assert axes.partition_spec(("embed", "mlp"), rules) == P("fsdp", None)
    with pytest.raises(MeshError, match="unknown sharding rules 'zero2'"):
        axes.make_update_rules("zero2")


def test_collisions_raise() -> None:
    rules = axes.make_rules("fsdp", [("mlp", ("fsdp",))])
    with pytest.raises(MeshError, match="'embed' and 'mlp'.*'fsdp'"):
        axes.partition_spec(("embed", "mlp"), rules)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ((("embed", ("fsdp",)),), "no sharding rule for"),
        ((*axes.make_rules("fsdp"), ("embed", ())), "more than one"),
        ((*axes.make_rules("fsdp"), ("emb", ())), "unknown logical axis 'emb'"),
        ((*axes.make_rules("fsdp")[1:], ("embed", ("model",))), "unknown mesh axis 'model'"),
    ],
)
def test_rule_sets_are_complete_and_unique(rules: axes.Rules, message: str) -> None:
    with pytest.raises(MeshError, match=message):
        axes.check_rules(rules)


def test_constrain_pins_the_layout() -> None:
    mesh = make_mesh(MeshShape(data=2, fsdp=2, tensor=2))
    constrain = axes.Constrain(axes.make_rules("fsdp"), mesh)
    y = jax.jit(lambda x: constrain(x * 2, "act_batch", "act_mlp"))(jnp.ones((8, 4)))
    assert y.sharding.spec == P(("data", "fsdp"), "tensor")
    with pytest.raises(MeshError, match="1 logical axes"):
        constrain(jnp.ones((2, 2)), "act_batch")


def test_a_function_runs_on_each_devices_part() -> None:
    mesh = make_mesh(MeshShape(data=2, fsdp=2, tensor=2))
    constrain = axes.Constrain(axes.make_rules("fsdp"), mesh)
    names = ("act_batch", "act_heads")
    x = jnp.arange(24.0).reshape(8, 3)
    # 3 heads do not divide by the 2 devices of `tensor`; without a mesh an array is whole.
    spec = constrain.fitted_spec(x.shape, names)
    assert spec == P(("data", "fsdp"), None)
    assert axes.Constrain(constrain.rules).fitted_spec(x.shape, names) == P(None, None)

    shapes = []

    def double(x: jax.Array) -> tuple[jax.Array]:
        shapes.append(x.shape)
        return (2 * x,)

    (y,) = jax.jit(constrain.on_each_device(double, spec, (spec,)))(x)
    np.testing.assert_array_equal(y, 2 * x)
    assert shapes == [(2, 3)]
    assert axes.Constrain(constrain.rules).on_each_device(double, spec, (spec,)) is double
