"""Readers of foreign files: choice of entry, damaged files, and no code from pickles."""

import argparse
import json
import pickle
import sys

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from dsr_jax.convert.readers import read_state
from dsr_jax.core.errors import ConversionError
from tests.requirements import require

ARRAYS = {
    "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b.bias": np.full(4, 0.5, np.float32),
}


@pytest.fixture
def torch():
    """The package, for tests that write its files."""
    return require("torch", "torch")


def tensors(torch, factor=1.0):
    return {name: torch.from_numpy(x * np.float32(factor)) for name, x in ARRAYS.items()}


def check_equal(state, factor=1.0, dtype=np.float32):
    assert list(state) == list(ARRAYS)
    for name, value in ARRAYS.items():
        assert state[name].dtype == dtype
        np.testing.assert_array_equal(state[name].astype(np.float32), value * np.float32(factor))


def test_safetensors_file(tmp_path):
    save_file(ARRAYS, tmp_path / "model.safetensors")
    check_equal(read_state(tmp_path / "model.safetensors"))


def test_snapshot_folder_in_one_file_or_in_parts(tmp_path):
    save_file(ARRAYS, tmp_path / "model.safetensors")
    check_equal(read_state(tmp_path))
    parts = tmp_path / "parts"
    parts.mkdir()
    files = {name: f"model-{i}.safetensors" for i, name in enumerate(ARRAYS)}
    (parts / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    for name, file in files.items():
        save_file({name: ARRAYS[name]}, parts / file)
    check_equal(read_state(parts))
    (parts / "model-1.safetensors").unlink()
    with pytest.raises(ConversionError, match=r"lacks \['model-1.safetensors'\]"):
        read_state(parts)


def test_snapshot_folder_with_several_candidate_files(tmp_path):
    with pytest.raises(ConversionError, match=f"{tmp_path} holds no .safetensors or .bin file"):
        read_state(tmp_path)
    for name in ("one", "two"):
        save_file(ARRAYS, tmp_path / f"{name}.safetensors")
    with pytest.raises(ConversionError, match=r"'one.safetensors', 'two.safetensors'.*\n.*name"):
        read_state(tmp_path)


def test_entry_of_a_torch_file(torch, tmp_path):
    path = tmp_path / "ep-1.pt"
    torch.save({"model": tensors(torch), "ema": tensors(torch, 2.0), "step": 7}, path)
    check_equal(read_state(path), 2.0)
    check_equal(read_state(path, "ema"), 2.0)
    check_equal(read_state(path, "model"))
    for entry in ("optimizer", "step"):
        with pytest.raises(ConversionError, match=f"no entry '{entry}'\n.*model, ema"):
            read_state(path, entry)


def test_a_command_line_next_to_the_weights_is_ignored(torch, tmp_path):
    arguments = argparse.Namespace(model="SiT-XL/2", epochs=1400)
    torch.save({"ema": tensors(torch), "args": arguments}, tmp_path / "0400000.pt")
    check_equal(read_state(tmp_path / "0400000.pt"))


def test_torch_files_without_ema_or_entries(torch, tmp_path):
    torch.save({"model": tensors(torch), "step": 7}, tmp_path / "model.pt")
    check_equal(read_state(tmp_path / "model.pt"))
    torch.save(tensors(torch), tmp_path / "bare.pt")
    check_equal(read_state(tmp_path / "bare.pt"))
    with pytest.raises(ConversionError, match="no entry 'ema'\n.*bare state dict"):
        read_state(tmp_path / "bare.pt", "ema")
    torch.save({"network": tensors(torch)}, tmp_path / "other.pt")
    check_equal(read_state(tmp_path / "other.pt", "network"))
    with pytest.raises(ConversionError, match=r"other.pt holds no tensors .*network\n.*--entry"):
        read_state(tmp_path / "other.pt")


def test_wrapper_prefixes_and_bfloat16(torch, tmp_path):
    path = tmp_path / "wrapped.pt"
    half = {f"module._orig_mod.{name}": x.bfloat16() for name, x in tensors(torch).items()}
    torch.save({"model": half}, path)
    check_equal(read_state(path), dtype=ml_dtypes.bfloat16)
    torch.save({**half, **tensors(torch)}, path)
    with pytest.raises(ConversionError, match="a.weight twice"):
        read_state(path)


def test_safetensors_in_bfloat16(torch, tmp_path):
    from safetensors.torch import save_file as save_torch_file

    half = {name: x.bfloat16() for name, x in tensors(torch).items()}
    save_torch_file(half, tmp_path / "half.safetensors")
    state = read_state(tmp_path / "half.safetensors")
    for name, value in ARRAYS.items():
        np.testing.assert_array_equal(state[name].astype(np.float32), value)


class Payload:
    """Runs code when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_pickled_code_is_refused_and_does_not_run(torch, tmp_path):
    proof = tmp_path / "proof"
    torch.save({"model": tensors(torch), "extra": Payload(proof)}, tmp_path / "zip.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"model": Payload(proof)}, protocol=2))
    for name in ("zip.pt", "plain.pt"):
        with pytest.raises(ConversionError, match=f"{name} is refused.*\n.*never pickled code"):
            read_state(tmp_path / name)
    assert not proof.exists()
    # The payload is a live one: Python's own reader runs it.
    pickle.loads((tmp_path / "plain.pt").read_bytes())["model"].close()
    assert proof.exists()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_truncated_torch_file_is_named(torch, tmp_path, share, zipped):
    path = tmp_path / "cut.pt"
    torch.save({"model": tensors(torch)}, path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ConversionError, match=r"cut.pt cannot be read.*\n.*copy it again"):
        read_state(path)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_truncated_safetensors_file_is_named(tmp_path, share):
    path = tmp_path / "cut.safetensors"
    save_file(ARRAYS, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ConversionError, match=r"cut.safetensors cannot be read.*\n.*copy it again"):
        read_state(path)


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_an_empty_file_is_named(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(ConversionError, match=f"{name} is an empty file\n.*did not fetch"):
        read_state(tmp_path / name)


def test_torch_file_without_torch(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "model.pt").write_bytes(b"anything")
    with pytest.raises(ConversionError, match=r"model.pt needs torch\n.*dsr_jax\[torch\]"):
        read_state(tmp_path / "model.pt")


def test_sources_without_weights(torch, tmp_path):
    with pytest.raises(ConversionError, match="absent.pt does not exist"):
        read_state(tmp_path / "absent.pt")
    torch.save({"step": 7}, tmp_path / "step.pt")
    with pytest.raises(ConversionError, match="step.pt holds no tensors"):
        read_state(tmp_path / "step.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ConversionError, match="list.pt holds a list"):
        read_state(tmp_path / "list.pt")


def test_entry_of_a_safetensors_file(tmp_path):
    save_file(ARRAYS, tmp_path / "model.safetensors")
    with pytest.raises(ConversionError, match="no entry 'ema'.*\n.*leave"):
        read_state(tmp_path / "model.safetensors", "ema")
