"""Runs a PyTorch encoder of `transformers` and ours on the same images, layer by layer.

    python tools/compare_torch.py SNAPSHOT [--images FOLDER] [--batch 4]

SNAPSHOT is a local folder with `config.json` and weights, as `hf download` or `save_pretrained`
leave it. Prints the largest difference, and the largest relative error of a token (norm of its
difference / its norm), of every block and of the final tokens.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dsr_jax.convert.hub import read_encoder
from dsr_jax.core.cli import make_parser, run_main
from dsr_jax.data.unlabeled import UnlabeledImages
from dsr_jax.models.vit import ViT
from dsr_jax.registers.streaming import NormalizedImages
from dsr_jax.registers.trace import trace_encoder


class Difference(NamedTuple):
    """How far ours is from PyTorch's behind one layer.

    Attributes:
      layer: "block 0", ..., "tokens".
      absolute: Largest difference.
      relative: Largest over all tokens of the norm of the difference over the token's norm, so
        that outlier tokens do not hide errors of the others.
    """

    layer: str
    absolute: float
    relative: float


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line `argv` (default: the process's)."""
    parser = make_parser(__doc__)
    parser.add_argument("snapshot", type=Path, help="folder of config.json and weights")
    parser.add_argument("--images", help="folder of images; default: normal noise")
    parser.add_argument("--image-size", type=int, help="side in pixels; default: 16 patches")
    parser.add_argument("--batch", type=int, default=4, help="number of images")
    args = parser.parse_args(argv)
    config, _ = read_encoder(args.snapshot)
    size = args.image_size or 16 * config.patch_size
    if args.images:
        source = UnlabeledImages(args.images, size, count=args.batch)
        images = NormalizedImages(source, config.pixel_mean, config.pixel_std)
        pixels = np.stack([images[i] for i in range(len(images))])
    else:
        pixels = np.random.default_rng(0).standard_normal((args.batch, size, size, 3), np.float32)
    for difference in compare(args.snapshot, pixels):
        print(f"{difference.layer:12} {difference.absolute:10.3e} {difference.relative:10.3e}")


def compare(snapshot: Path, pixels: np.ndarray) -> list[Difference]:
    """Differences at every block and at the end, in float32.

    Args:
      snapshot: Folder with an HF encoder.
      pixels: Normalized images [B, H, W, 3].
    """
    config, params = read_encoder(snapshot)
    with jax.default_matmul_precision("highest"):
        ours = trace_encoder(ViT(config), params, pixels)
    theirs = run_torch(snapshot, pixels)
    layers = [
        (f"block {i}", a, b) for i, (a, b) in enumerate(zip(ours.outputs, theirs, strict=True))
    ]
    patches = theirs[-1][:, config.num_prefix :]
    centered = patches - patches.mean(axis=-1, keepdims=True)
    variance = np.square(centered).mean(axis=-1, keepdims=True)
    layers.append(("tokens", ours.tokens, centered / np.sqrt(variance + config.layer_norm_eps)))
    return [_difference(layer, np.asarray(a), b) for layer, a, b in layers]


def run_torch(snapshot: Path, pixels: np.ndarray) -> list[np.ndarray]:
    """Returns the output of each block of the HF encoder [B, S, D]."""
    import torch

    model, inputs = _load_torch(snapshot)
    depth = model.config.num_hidden_layers
    lists = (m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    layers = next(blocks for blocks in lists if len(blocks) == depth)
    outputs: list[np.ndarray] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        # Releases before 5 return a tuple, from 5 on a tensor.
        hidden = output[0] if isinstance(output, tuple) else output
        outputs.append(hidden.detach().numpy())

    handles = [layer.register_forward_hook(keep) for layer in layers]
    with torch.no_grad():
        model(
            torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))), **inputs(pixels)
        )
    for handle in handles:
        handle.remove()
    return outputs


def _load_torch(snapshot: Path) -> tuple[Any, Any]:
    """The HF model in eval mode, and a function from pixels to its further arguments."""
    import torch
    import transformers

    # Weights beside the encoder's, such as MAE's decoder, are reported as unexpected.
    transformers.logging.set_verbosity_error()
    kind = json.loads((snapshot / "config.json").read_text())["model_type"]
    if kind == "siglip":
        model = transformers.SiglipModel.from_pretrained(snapshot).vision_model
    else:
        model = transformers.AutoModel.from_pretrained(snapshot)
    model = model.float().eval()

    def inputs(pixels: np.ndarray) -> dict[str, Any]:
        if kind in ("siglip", "siglip_vision_model"):
            return {"interpolate_pos_encoding": True}
        if kind == "vit_mae":
            # Without masking, and with an order of the patches that is the identity.
            model.config.mask_ratio = model.embeddings.config.mask_ratio = 0.0
            count = pixels.shape[1] * pixels.shape[2] // model.config.patch_size**2
            noise = torch.arange(count, dtype=torch.float32).expand(len(pixels), -1)
            return {"noise": noise, "interpolate_pos_encoding": True}
        return {}

    return model, inputs


def _difference(layer: str, ours: np.ndarray, theirs: np.ndarray) -> Difference:
    error = ours - theirs
    relative = np.linalg.norm(error, axis=-1) / np.linalg.norm(theirs, axis=-1)
    return Difference(layer, float(np.abs(error).max()), float(relative.max()))


if __name__ == "__main__":
    run_main(main)
