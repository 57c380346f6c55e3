"""SiT-XL/2 with diffusion registers on ImageNet 256x256, in the latents of the SD-VAE.

    python -m dsr_jax.convert sdvae --source stabilityai/sd-vae-ft-ema --out converted/sdvae
    python -m dsr_jax.train --config=configs/sit_xl.py --workdir=runs/sit_xl \
        --config.data.root=imagenet
    python -m dsr_jax.train --config=configs/sit_xl.py:registers=0 --workdir=runs/sit_xl_baseline \
        --config.data.root=imagenet

The registers' paper reports FID-50k, without guidance, of 16.05 without registers and 14.47 with
36, without the number of steps. SiT's authors report about 16 for 400 thousand steps of 256 images,
which this config trains (SiT's trainer continues to 1400 epochs, 7 million steps). The recipe is
that of SiT's trainer: AdamW at a constant 1e-4, velocity prediction, uniform times, a frozen
position table; sampling by 250 steps of the reverse SDE.

Arguments: `registers=0` (the baseline; default 36), `variant=B` (one of S, B, L and XL), `runlocal`
(a smoke run of a few steps on synthetic shapes, in pixels, without a VAE).
"""

from ml_collections import ConfigDict

from dsr_jax.config import base_config, choose, parse_arg, recipes
from dsr_jax.models.dit import REGISTER_START
from dsr_jax.models.sit import SIT


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config; see the module's docstring for `arg`."""
    args = parse_arg(arg, registers=36, variant="XL", runlocal=False)
    config = base_config()

    config.model.name = "sit"
    config.model.update(choose(SIT, "variant", args.variant))
    config.registers.num = args.registers
    config.registers.start = REGISTER_START[args.variant]
    config.space.name = "vae"
    config.space.vae = "converted/sdvae"

    recipes.use_imagenet(config, global_batch=256)

    config.objective.prediction = "velocity"
    config.objective.time_distribution = "uniform"
    config.objective.time_range = (0.0, 1.0)

    config.optim.lr = 1e-4
    config.optim.b2 = 0.999
    config.optim.freeze = ("*pos_embed",)
    config.train.steps = 400_000
    config.precision.matmul = "tensorfloat32"

    config.sample.method = "sde-euler"
    config.sample.num_points = 250
    config.sample.guidance_channels = 3
    config.sample.uint8 = "sit"

    if args.runlocal:
        config.model.update(hidden_size=32, depth=2, num_heads=2)
        config.registers.num = min(args.registers, 4)
        config.registers.start = 1
        config.space.name = "pixels"
        recipes.run_locally(config)
        config.data.update(source="synthetic", image_size=16, channels=3)
    return config
