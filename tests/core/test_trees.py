"""Names of leaves, and sizes."""

import jax
import jax.numpy as jnp
import pytest

from dsr_jax.core import trees


def test_names_round_trip() -> None:
    tree = {"blocks": {"attn": {"kernel": jnp.ones((2, 3))}}, "bias": jnp.zeros(4)}
    flat = trees.flatten_names(tree)
    assert set(flat) == {"blocks/attn/kernel", "bias"}
    assert jax.tree.structure(trees.unflatten_names(flat)) == jax.tree.structure(tree)


def test_a_leaf_cannot_be_a_folder() -> None:
    with pytest.raises(ValueError, match="a/b"):
        trees.unflatten_names({"a": 1, "a/b": 2})
    with pytest.raises(ValueError, match="'a'"):
        trees.unflatten_names({"a/b": 2, "a": 1})


def test_selected_leaves_are_filled_up_again() -> None:
    tree = {"a": {"x": 1, "y": 2}, "b": {"z": {"w": 3}}, "c": 4}
    wanted = {"a": {"x": True, "y": False}, "b": {"z": {"w": False}}, "c": True}
    part = trees.select(tree, wanted)
    assert part == {"a": {"x": 1}, "c": 4}
    assert trees.fill(part, tree) == tree
    assert trees.fill({"a": {"x": 10}}, tree) == {**tree, "a": {"x": 10, "y": 2}}
    assert trees.fill({}, tree) == tree and trees.fill(5, 6) == 5


def test_sizes_of_abstract_trees() -> None:
    tree = {
        "a": jax.ShapeDtypeStruct((3, 4), jnp.float32),
        "b": jax.ShapeDtypeStruct((5,), jnp.int8),
    }
    assert trees.count_params(tree) == 17
    assert trees.tree_bytes(tree) == 53
