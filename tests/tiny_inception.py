"""A narrow Inception with random weights, and a fake feature network."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from dsr_jax.convert.__main__ import main as convert

_CASE = Path(__file__).parent / "golden" / "eval_inception_tiny" / "io.npz"


def tiny_state():
    """The golden case's state dict, under the names of the `.pth`."""
    with np.load(_CASE) as arrays:
        return {
            key.removeprefix("params/"): arrays[key] for key in arrays if key.startswith("params/")
        }


def convert_tiny(folder):
    """Converts that network into `folder`/inception and returns the path."""
    save_file(tiny_state(), folder / "inception.safetensors")
    out = folder / "inception"
    convert(["inception", "--source", str(folder / "inception.safetensors"), "--out", str(out)])
    return out


class StandIn:
    """Extracts features as `features.Extractor` does, by random projections: no compilation."""

    widths = {"pool": 12, "spatial": 9, "logits": 5, "class_token": 7}
    records = ()

    def __init__(self, batch=8):
        self.batch, self.rows = batch, np.arange(batch)
        self.images = 0

    def recipe(self, outputs):
        found = {"weights": "sha256:w", "resize": "adm"} if outputs - {"class_token"} else {}
        return found | ({"dinov2": {"weights": "sha256:d"}} if "class_token" in outputs else {})

    def __call__(self, images, outputs, first=0):
        self.images += len(images)
        pixels = images.reshape(len(images), -1) / 255.0
        found = {
            name: jnp.asarray(
                np.tanh(pixels @ np.random.RandomState(i).randn(pixels.shape[1], width)),
                jnp.float32,
            )
            for i, (name, width) in enumerate(self.widths.items())
            if name in outputs
        }
        if "images" in outputs:
            found["images"] = jnp.asarray(images)
        levels = images.reshape(len(images), -1)
        return found | {
            "min": jnp.asarray(levels.min(axis=1)),
            "max": jnp.asarray(levels.max(axis=1)),
            "index": first + jnp.arange(len(images)),
        }
