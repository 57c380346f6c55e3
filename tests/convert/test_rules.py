"""The rule engine: exact layouts, strictness in both directions, stacks and single layers."""

import numpy as np
import pytest

from dsr_jax.convert.rules import (
    CONV,
    LINEAR,
    SAME,
    Rule,
    RuleSet,
    Stack,
    flax_to_torch,
    linear,
    stack_layers,
    torch_to_flax,
    unstack_layers,
    vector,
)
from dsr_jax.core.errors import ConversionError
from dsr_jax.core.trees import flatten_names
from dsr_jax.models.depth import split_into_stacks

STACKS = (Stack("front", 0, 1), Stack("back", 1, 3))
RULES = RuleSet(
    (
        Rule("head.weight", "head/kernel", LINEAR),
        Rule("layers.{i}.qkv.weight", "qkv/kernel", linear(outputs=(3, 2)), STACKS),
    ),
    {"head/kernel": (4, 5), "front/qkv/kernel": (1, 4, 3, 2), "back/qkv/kernel": (2, 4, 3, 2)},
    ("cache.*",),
)


def state():
    """A state dict that fits RULES, with a key that they drop."""
    random = np.random.RandomState(0)
    shapes = {"head.weight": (5, 4), **{f"layers.{i}.qkv.weight": (6, 4) for i in range(3)}}
    arrays = {
        name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()
    }
    return {**arrays, "cache.cos": np.ones(3, np.float32)}


@pytest.mark.parametrize(
    ("layout", "source", "target"),
    [
        (SAME, (3, 4), (3, 4)),
        (SAME, (), ()),
        (LINEAR, (6, 4), (4, 6)),
        (CONV, (8, 3, 2, 5), (2, 5, 3, 8)),
        (linear(outputs=(3, 2, 4)), (24, 5), (5, 3, 2, 4)),
        (linear(inputs=(2, 3)), (5, 6), (2, 3, 5)),
        (vector(2, 3), (6,), (2, 3)),
        (vector(1, 6), (6, 5), (1, 6, 5)),
    ],
)
def test_layouts_are_inverted(layout, source, target):
    x = np.arange(np.prod(source, dtype=int), dtype=np.float32).reshape(source)
    y = layout.to_flax(x)
    assert y.shape == target
    np.testing.assert_array_equal(layout.to_torch(y), x)


def test_layouts_assign_every_value():
    weight = np.arange(24).reshape(6, 4)  # [3 parts x 2 channels, inputs]
    assert linear(outputs=(3, 2)).to_flax(weight)[1, 2, 0] == weight[2 * 2 + 0, 1]
    assert linear(inputs=(2, 2)).to_flax(weight)[1, 0, 5] == weight[5, 2]
    image = np.arange(120).reshape(2, 3, 4, 5)
    assert CONV.to_flax(image)[3, 1, 2, 0] == image[0, 2, 3, 1]


def test_axis_that_does_not_split():
    with pytest.raises(ValueError, match=r"7 .*\(2, 3\)"):
        vector(2, 3).to_flax(np.zeros(7))


def test_round_trip_over_stacks():
    source = state()
    params = torch_to_flax(source, RULES)
    assert {name: x.shape for name, x in flatten_names(params).items()} == RULES.shapes
    np.testing.assert_array_equal(
        params["back"]["qkv"]["kernel"][1].reshape(4, 6).T, source["layers.2.qkv.weight"]
    )
    back = flax_to_torch(params, RULES)
    assert set(back) == set(source) - {"cache.cos"}
    for name, value in back.items():
        np.testing.assert_array_equal(value, source[name])


def test_parameters_are_new_arrays():
    source = state()
    params = torch_to_flax(source, RULES)
    params["head"]["kernel"][:] = 0
    params["front"]["qkv"]["kernel"][:] = 0
    assert all(np.abs(value).min() > 0 for value in source.values())


def test_half_precision_becomes_float32_exactly():
    source = {name: value.astype(np.float16) for name, value in state().items()}
    kernel = torch_to_flax(source, RULES)["head"]["kernel"]
    assert kernel.dtype == np.float32
    np.testing.assert_array_equal(kernel, source["head.weight"].T.astype(np.float32))


def without(name):
    return {key: value for key, value in state().items() if key != name}


@pytest.mark.parametrize(
    ("source", "pattern"),
    [
        (without("layers.2.qkv.weight"), r"missing from .*\(1\):\n +layers\.2\.qkv\.weight"),
        ({**state(), "stray.bias": np.zeros(2)}, r"not known .*\(1\):\n +stray\.bias"),
        ({**state(), "layers.3.qkv.weight": np.zeros((6, 4))}, r"not known .*\n +layers\.3\."),
        (
            {**state(), "layers.2.qkv.weight": np.zeros((6, 5))},
            r"another shape \(1\):\n +layers\.2\.qkv\.weight is \[6, 5\].*needs \[6, 4\]",
        ),
        ({**state(), "head.weight": np.zeros((4, 5))}, r"head\.weight is \[4, 5\].*needs \[5, 4\]"),
        ({**state(), "head.weight": np.zeros(20)}, r"head\.weight is \[20\].*needs \[5, 4\]"),
    ],
)
def test_state_dicts_that_do_not_fit(source, pattern):
    with pytest.raises(ConversionError, match=pattern) as caught:
        torch_to_flax(source, RULES)
    assert "right entry of the file" in caught.value.remedy


def test_all_problems_are_listed_together():
    source = {**without("head.weight"), "layers.0.qkv.weight": np.zeros(1)}
    source |= {f"stray.{i}": np.zeros(1) for i in range(12)}
    with pytest.raises(ConversionError) as caught:
        torch_to_flax(source, RULES)
    for part in ("head.weight", "layers.0.qkv.weight is [1]", "(12):", "stray.9", "and 2 more"):
        assert part in str(caught.value)
    assert "stray.10" not in str(caught.value)


def test_tables_that_do_not_fit_their_model():
    more = RuleSet(RULES.rules, {**RULES.shapes, "tail/bias": (2,)}, RULES.dropped)
    with pytest.raises(ConversionError, match=r"no rule sets \(1\):\n +tail/bias"):
        torch_to_flax(state(), more)
    fewer = {name: shape for name, shape in RULES.shapes.items() if name != "head/kernel"}
    less = RuleSet(RULES.rules, fewer, RULES.dropped)
    with pytest.raises(ConversionError, match=r"the model lacks \(1\):\n +head/kernel"):
        torch_to_flax(state(), less)
    with pytest.raises(ConversionError, match=r"table lacks \(1\):\n +head/kernel"):
        flax_to_torch(torch_to_flax(state(), RULES), less)


@pytest.mark.parametrize(
    ("name", "value", "pattern"),
    [
        ("front", {}, r"missing parameters \(1\):\n +front/qkv/kernel"),
        ("tail", {"bias": np.zeros(2)}, r"table lacks \(1\):\n +tail/bias"),
        ("head", {"kernel": np.zeros((5, 4))}, r"head/kernel is \[5, 4\].*has \[4, 5\]"),
        (
            "back",
            {"qkv": {"kernel": np.zeros((3, 4, 3, 2))}},
            r"back/qkv/kernel is \[3, 4, 3, 2\].*has \[2, 4, 3, 2\]",
        ),
    ],
)
def test_parameters_that_do_not_fit(name, value, pattern):
    with pytest.raises(ConversionError, match=pattern):
        flax_to_torch({**torch_to_flax(state(), RULES), name: value}, RULES)


@pytest.mark.parametrize(
    ("registers", "start", "expected"),
    [
        (0, 0, [("blocks", 0, 5)]),
        (4, 0, [("blocks_reg", 0, 5)]),
        (4, 2, [("blocks_pre", 0, 2), ("blocks_reg", 2, 5)]),
    ],
)
def test_stacks_and_single_layers(registers, start, expected):
    stacks = split_into_stacks(5, {"reg": start} if registers else {})
    assert [(stack.name, stack.first, stack.end) for stack in stacks] == expected
    layers = [{"mlp": {"bias": np.full(3, i)}, "scale": np.float32(i)} for i in range(5)]
    tree = stack_layers(layers, stacks)
    assert tree[expected[-1][0]]["mlp"]["bias"].shape == (5 - expected[-1][1], 3)
    again = unstack_layers(tree, stacks)
    assert len(again) == 5
    for layer, copy in zip(layers, again, strict=True):
        np.testing.assert_array_equal(layer["mlp"]["bias"], copy["mlp"]["bias"])
        np.testing.assert_array_equal(layer["scale"], copy["scale"])


def test_layers_that_do_not_fill_the_stacks():
    with pytest.raises(ConversionError, match="2 layers do not fill"):
        stack_layers([{"scale": np.zeros(1)}] * 2, STACKS)
