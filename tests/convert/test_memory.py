"""Conversion of a large checkpoint maps the file and holds one layer at a time."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from dsr_jax.models.sit import SiT
from tests.convert.official_states import make_state
from tests.requirements import require

PROGRAM = """
import re, sys
from dsr_jax.convert.__main__ import main

def convert(source, out):
    main(["sit", "--source", source, "--out", out, "--num-heads", "4"])
    # Not ru_maxrss, which a process inherits from the one that started it.
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])

tiny, large, out = sys.argv[1:]
before = convert(tiny, out + "/tiny")
print("grown", convert(large, out + "/large") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_peak_memory_is_that_of_the_mapped_file(kind: str, tmp_path: Path) -> None:
    files, size = [], 0
    for name, width in (("tiny", 8), ("large", 512)):
        sizes = dict(input_size=8, in_channels=4, hidden_size=width, depth=10, num_heads=4)
        state = make_state(SiT(**sizes, num_classes=3))
        size = sum(value.nbytes for value in state.values())
        files.append(tmp_path / f"{name}.{kind}")
        if kind == "pt":
            torch = require("torch", "torch")
            tensors = {key: torch.from_numpy(value) for key, value in state.items()}
            # The parameters without EMA are never read.
            others = {key: tensor + 1 for key, tensor in tensors.items()}
            torch.save({"model": others, "ema": tensors}, files[-1])
        else:
            save_file(state, files[-1])
    assert size > 150e6
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, files), str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    grown = int(done.stdout.split("grown")[1])
    # The mapped pages count as the process's memory, too; that they do shows that it is measured.
    assert 0.5 * size < grown < 1.5 * size, f"{grown / size:.2f} times the parameters' bytes"


def test_no_array_of_the_whole_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the machine: nothing larger than a layer is written at once."""
    from dsr_jax.convert import __main__ as command
    from dsr_jax.convert import tensors

    state = make_state(
        SiT(input_size=8, in_channels=4, hidden_size=16, depth=4, num_heads=2, num_classes=3)
    )
    save_file(state, tmp_path / "x.safetensors")
    largest = []
    contiguous = np.ascontiguousarray

    class Numpy:
        def __getattr__(self, name: str) -> object:
            return getattr(np, name)

        def ascontiguousarray(self, piece: np.ndarray) -> np.ndarray:
            largest.append(piece.nbytes)
            return contiguous(piece)

    monkeypatch.setattr(tensors, "np", Numpy())
    command.main(
        ["sit", f"--source={tmp_path / 'x.safetensors'}", f"--out={tmp_path}/o", "--num-heads=2"]
    )
    assert max(largest) == max(value.nbytes for value in state.values())
