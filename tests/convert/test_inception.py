"""Inception from the PyTorch ports' state dict and from a TensorFlow graph, and back."""

import struct

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dsr_jax.convert.__main__ import main
from dsr_jax.convert.graphdef import read_constants
from dsr_jax.convert.inception import (
    inception_rules,
    infer_inception,
    load_inception,
    paths,
    read_inception,
)
from dsr_jax.convert.rules import flax_to_torch
from dsr_jax.core.errors import ConversionError
from dsr_jax.core.files import read_json
from dsr_jax.core.trees import flatten_names
from tests.tiny_inception import convert_tiny, tiny_state


def varint(value):
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes(out) + bytes([value])


def field(number, content):
    """A length-delimited field, or a number's."""
    if isinstance(content, int):
        return varint(number << 3) + varint(content)
    return varint(number << 3 | 2) + varint(len(content)) + content


def node(name, array, *, splat=False, operation=b"Const", kind=1):
    """A NodeDef with a constant, as TensorFlow serializes it."""
    sizes = b"".join(field(2, field(1, size)) for size in array.shape)
    values = struct.pack("<f", array.flat[0]) if splat else array.astype("<f4").tobytes()
    tensor = field(1, kind) + field(2, sizes) + field(5 if splat else 4, values)
    value = field(5, field(1, b"value") + field(2, field(8, tensor)))
    other = field(5, field(1, b"dtype") + field(2, field(6, 1)))
    return field(1, field(1, name.encode()) + field(2, operation) + other + value)


def graph_of(state):
    """The state dict as a graph file under TensorFlow's names."""
    network = infer_inception(state)
    _, params = read_state_dict(state)
    constants = flax_to_torch(params, inception_rules(network, "tensorflow"))
    nodes = [node(name, array) for name, array in constants.items()]
    # What a real graph has besides: sizes, scalars, operations.
    nodes.append(node("Mul/y", np.float32([0.0078125]).reshape(())))
    nodes.append(node("ResizeBilinear/size", np.float32([299, 299]), kind=3))
    nodes.append(node("pool_3", np.zeros(2, np.float32), operation=b"AvgPool"))
    return b"".join(nodes) + field(4, field(1, 21))


def read_state_dict(state):
    from dsr_jax.convert.rules import torch_to_flax

    network = infer_inception(state)
    return network, torch_to_flax(state, inception_rules(network))


def test_names_of_tensorflow_scopes():
    scopes = paths("tensorflow")
    assert len(scopes) == 94
    for path, scope in {
        "Conv2d_4a_3x3": "conv_4",
        "Mixed_5b/branch1x1": "mixed/conv",
        "Mixed_5c/branch3x3dbl_3": "mixed_1/tower_1/conv_2",
        "Mixed_6a/branch3x3dbl_2": "mixed_3/tower/conv_1",
        "Mixed_6d/branch1x1": "mixed_6/conv",
        "Mixed_6e/branch_pool": "mixed_7/tower_2/conv",
        "Mixed_7a/branch3x3_1": "mixed_8/tower/conv",
        "Mixed_7a/branch7x7x3_4": "mixed_8/tower_1/conv_3",
        "Mixed_7c/branch3x3_2b": "mixed_10/tower/mixed/conv_1",
        "Mixed_7c/branch3x3dbl_2": "mixed_10/tower_1/conv_1",
        "Mixed_7c/branch3x3dbl_3a": "mixed_10/tower_1/mixed/conv",
    }.items():
        assert scopes[path] == scope


def test_both_files_give_the_same_weights_and_digest(tmp_path):
    folder = convert_tiny(tmp_path)
    (tmp_path / "graph.pb").write_bytes(graph_of(tiny_state()))
    other = tmp_path / "other"
    main(["inception", "--source", str(tmp_path / "graph.pb"), "--out", str(other)])
    digests = {read_json(path / "conversion.json")["params_digest"] for path in (folder, other)}
    assert len(digests) == 1
    record = read_json(folder / "conversion.json")
    assert record["model"] == {"width_div": 16, "num_classes": 63}
    assert not record["published"] and record["source_digest"].startswith("sha256:")


def test_the_way_back_is_exact(tmp_path):
    folder, back = convert_tiny(tmp_path), tmp_path / "back.safetensors"
    main(["export", "--source", str(folder), "--out", str(back)])
    found, state = load_file(back), tiny_state()
    assert found.keys() == state.keys()
    for name, array in state.items():
        np.testing.assert_array_equal(found[name], array)


def test_counters_of_batches_are_dropped_and_the_rest_is_strict(tmp_path):
    state = tiny_state()
    extra = {"Conv2d_1a_3x3.bn.num_batches_tracked": np.zeros((), np.int64)}
    assert read_state_dict(state | extra)[0] == read_state_dict(state)[0]
    renamed = dict(state)
    renamed["AuxLogits.fc.weight"] = renamed.pop("Mixed_7c.branch1x1.bn.bias")
    save_file(renamed, tmp_path / "other.safetensors")
    with pytest.raises(ConversionError, match="AuxLogits.fc.weight"):
        read_inception(tmp_path / "other.safetensors")


def test_missing_weights_are_reported_with_their_source(tmp_path):
    for call in (
        lambda: load_inception(tmp_path / "none"),
        lambda: read_inception(tmp_path / "none.pth"),
    ):
        with pytest.raises(ConversionError, match="pytorch-fid.*6726825d"):
            call()
    save_file({"weight": np.zeros((2, 2), np.float32)}, tmp_path / "other.safetensors")
    with pytest.raises(ConversionError, match="not FID's Inception"):
        read_inception(tmp_path / "other.safetensors")


def test_constants_of_a_graph(tmp_path):
    full, path = np.arange(6, dtype=np.float32).reshape(2, 3), tmp_path / "graph.pb"
    path.write_bytes(node("full", full) + node("same", np.full((2, 2), 3.5), splat=True))
    found = read_constants(path)
    np.testing.assert_array_equal(found["full"], full)
    np.testing.assert_array_equal(found["same"], np.full((2, 2), 3.5, np.float32))
    assert list(found) == ["full", "same"]


@pytest.mark.parametrize("end", [1, 3, 20, -1, -10])
def test_graphs_that_are_cut_short_are_refused(tmp_path, end):
    raw, path = node("full", np.arange(6, dtype=np.float32)), tmp_path / "graph.pb"
    path.write_bytes(raw[:end])
    with pytest.raises(ConversionError, match="graph.pb"):
        read_constants(path)


def test_graphs_of_other_content_are_refused(tmp_path):
    path = tmp_path / "graph.pb"
    wrong = node("short", np.zeros(3, np.float32)).replace(field(1, 3), field(1, 9))
    for raw, reason in (
        (b"\x0b\x00", "wire type 3"),
        (b"\xff" * 12, "more than ten bytes"),
        (wrong, "12 bytes"),
        (b"", "no constants"),
    ):
        path.write_bytes(raw)
        with pytest.raises(ConversionError, match=reason):
            read_constants(path)


def test_every_parameter_has_a_name_in_both_origins():
    network, params = read_state_dict(tiny_state())
    count = len(flatten_names(params))
    assert count == 94 * 5 + 2
    for origin in ("torch", "tensorflow"):
        assert len(flax_to_torch(params, inception_rules(network, origin))) == count
