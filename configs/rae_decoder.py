"""The ViT-XL decoder of a representation autoencoder, as RAE and DSR train it on ImageNet.

    python -m dsr_jax.convert siglip2 --source google/siglip2-base-patch16-256 \
        --out converted/siglip2-base
    python -m dsr_jax.convert lpips --source vgg.pth --vgg vgg16-397923af.pth --out converted/lpips
    python -m dsr_jax.convert dino_discriminator --source dino_vit_small_patch8_224.pth \
        --out converted/dino
    python -m dsr_jax.train_decoder --config=configs/rae_decoder.py --workdir=runs/rae_decoder \
        --config.data.root=imagenet

The recipe of stage 1 (spec encoder 8): 16 epochs of 512 images, L1 and LPIPS from the first step, a
discriminator from epoch 6 and its loss for the decoder from epoch 8; noise of up to 0.8 on the
latents. Test-time registers are `--config.space.neurons=...`; DSR's decoder for SigLIP2-B with them
has `--config.space.noise_tau=2.0`. Without the files of LPIPS or DINO, switch those losses off:
`--config.lpips.weight=0.0`, `--config.gan.weight=0.0`.

Arguments: `decoder=ViTB` (one of ViTB, ViTL and ViTXL), `runlocal` (a smoke run of a few steps on
digits, with tiny frozen networks of random weights).
"""

from ml_collections import ConfigDict

from dsr_jax.config import base_config, choose, parse_arg
from dsr_jax.models.variants import DECODERS

IMAGENET = 1_281_167


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config; see the module's docstring for `arg`."""
    args = parse_arg(arg, decoder="ViTXL", runlocal=False)
    config = base_config()

    config.space.name = "rae"
    config.space.encoder = "converted/siglip2-base"
    config.space.noise_tau = 0.8
    config.decoder.update(choose(DECODERS, "decoder", args.decoder))
    config.decoder.patch_size = 16

    config.data.source = "folder"
    config.data.image_size = 256
    config.data.crop_from = 384
    config.data.channels = 3
    config.data.num_classes = 1000
    config.data.global_batch = 512
    config.data.flip = False
    config.data.workers = 8

    epoch = IMAGENET // config.data.global_batch
    config.optim.lr = 2e-4
    config.optim.schedule = "cosine"
    config.optim.final_lr = 2e-5
    config.optim.warmup_steps = epoch
    config.optim.warmup_from_zero = True
    config.optim.decay_end_steps = 16 * epoch
    config.ema.decays = (0.9978,)
    config.train.steps = 16 * epoch

    config.lpips.folder = "converted/lpips"
    config.gan.backbone = "converted/dino"
    config.gan.discriminator_start = 6 * epoch
    config.gan.generator_start = 8 * epoch

    config.checkpoint.every_steps = epoch
    config.checkpoint.keep_every = 4 * epoch
    config.sample.ema = "0.9978"
    config.sample.every_steps = epoch
    config.sample.num = 16
    config.eval.split = "val"
    config.eval.num_samples = 1_024

    if args.runlocal:
        _shrink(config)
    return config


def _shrink(config: ConfigDict) -> None:
    """Makes it a matter of seconds, without files."""
    config.space.encoder = "random:tiny"
    config.space.image_size = 32
    config.decoder.update(hidden_size=32, depth=2, num_heads=2, mlp_dim=64, patch_size=8)
    config.data.source = "digits"
    config.data.image_size = 32
    config.data.crop_from = 40
    config.data.num_classes = 10
    config.data.global_batch = 16
    config.data.workers = 0
    config.optim.warmup_steps = 2
    config.optim.decay_end_steps = 8
    config.train.steps = 8
    config.lpips.folder = "random:tiny"
    config.gan.backbone = "random:tiny"
    config.gan.discriminator_start = 2
    config.gan.generator_start = 4
    config.checkpoint.every_steps = 4
    config.log.every_steps = 2
    config.sample.every_steps = 4
    config.sample.batch = 16
    config.eval.split = "heldout"
    config.eval.num_samples = 32
