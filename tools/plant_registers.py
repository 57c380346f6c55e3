"""Writes a small random encoder with planted register neurons, to try the search without weights.

    python tools/plant_registers.py --root IMAGES --out enc/planted
    python tools/find_registers.py enc/planted --root IMAGES --image-size 64 --top-k 6 --out found

The search then finds the planted units, which enc/planted/planted.json lists, and its report shows
that the outliers of these images are removed.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from dsr_jax.convert.files import save_converted
from dsr_jax.core.cli import make_parser, run_main
from dsr_jax.core.rng import root_key
from dsr_jax.data.unlabeled import UnlabeledImages
from dsr_jax.models.vit import ViT, ViTConfig
from dsr_jax.registers.neurons import save_neurons
from dsr_jax.registers.planting import plant_register_neurons
from dsr_jax.registers.streaming import NormalizedImages

CONFIG = ViTConfig(
    family="siglip",
    image_size=64,
    patch_size=8,
    hidden_size=64,
    depth=6,
    num_heads=4,
    mlp_dim=256,
    activation="gelu_tanh",
)
NEURONS = {1: [17, 80], 2: [5, 99, 200], 3: [31]}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line `argv` (default: the process's)."""
    parser = make_parser(__doc__)
    parser.add_argument("--root", required=True, help="folder of images, in any layout")
    parser.add_argument("--out", type=Path, required=True, help="new folder for the encoder")
    parser.add_argument("--images", type=int, default=64, help="number of images to calibrate on")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and images")
    args = parser.parse_args(argv)
    source = UnlabeledImages(
        args.root, CONFIG.image_size, count=args.images, seed=args.seed, on_corrupt="skip"
    )
    images = NormalizedImages(source, CONFIG.pixel_mean, CONFIG.pixel_std)
    pixels = np.stack([images[i] for i in range(len(images))])
    model = ViT(CONFIG)
    boxed = model.init(root_key(args.seed), jnp.asarray(pixels[:1]))
    planted = plant_register_neurons(model, nn.unbox(boxed)["params"], pixels, NEURONS)
    record = {"family": "siglip2", "model": dataclasses.asdict(CONFIG), "source": "planted"}
    save_converted(args.out, planted.params, record)
    save_neurons(args.out / "planted.json", planted.neurons)
    print(
        f"{args.out}: encoder with {sum(map(len, NEURONS.values()))} register neurons, which make "
        f"{int(planted.outliers.sum())} of {planted.outliers.size} patches outliers"
    )


if __name__ == "__main__":
    run_main(main)
