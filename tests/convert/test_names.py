"""Wrappers' names inside state dicts, networks below attributes, and what is left out by name."""

import numpy as np
import pytest

from dsr_jax.convert.names import drop, drop_flags, split_networks, unwrap
from dsr_jax.core.errors import ConversionError

X = np.ones(2, np.float32)


@pytest.mark.parametrize(
    "name",
    [
        "module._orig_mod.blocks.0.attn.weight",
        "blocks.0._orig_mod.attn.weight",
        "blocks.0._checkpoint_wrapped_module.attn.weight",
        "_fsdp_wrapped_module.blocks.0._fsdp_wrapped_module.attn.weight",
        "_fsdp_wrapped_module._fpw_module.blocks.0.attn.weight",
        "_forward_module.blocks.0.attn.module.weight",
    ],
)
def test_wrappers_are_taken_out_wherever_they_stand(name: str) -> None:
    assert list(unwrap("x.pt", {name: X, "n_averaged": np.array(3)})) == ["blocks.0.attn.weight"]


def test_names_that_become_one_are_refused() -> None:
    with pytest.raises(ConversionError, match=r"x\.pt holds a\.weight twice.*_orig_mod"):
        unwrap("x.pt", {"a._orig_mod.weight": X, "a.weight": X})


def test_flattened_parameters_are_named() -> None:
    with pytest.raises(ConversionError, match="FSDP has flattened.*\n.*FULL_STATE_DICT"):
        unwrap("x.pt", {"_fsdp_wrapped_module._flat_param": X})


def test_networks_below_attributes_come_apart_with_the_ema_first() -> None:
    networks = split_networks({"model.a": X, "ema.a": 2 * X})
    assert list(networks) == ["ema", "model"] and list(networks["ema"]) == ["a"]
    assert list(split_networks({"online_model.a": X, "ema_model.a": X})) == [
        "ema_model",
        "online_model",
    ]
    assert split_networks({"model.a": X, "head.b": X}) == {}
    assert split_networks({"ema": X}) == {}


def test_tensors_are_dropped_by_pattern() -> None:
    state = {"blocks.0.a": X, "projectors.0.0.weight": X, "head": X}
    assert list(drop(state, ("projectors.*", "head"), "x.pt")) == ["blocks.0.a"]
    with pytest.raises(ConversionError, match=r"--drop 'none\.\*' names no tensor of x\.pt"):
        drop(state, ("none.*",), "x.pt")


def test_flags_are_suggested_only_for_parts_that_the_model_lacks() -> None:
    known = ["blocks.0.a", "head"]
    unknown = ["projectors.0.w", "projectors.1.w", "mask_token"]
    assert drop_flags(unknown, known) == "--drop 'projectors.*' --drop 'mask_token'"
    assert drop_flags([*unknown, "blocks.1.a"], known) == ""
    assert drop_flags([], known) == ""
