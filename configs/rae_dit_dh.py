"""RAE-DiT-DH with dual-stage registers: a denoiser with a wide shallow head, ImageNet 256x256.

The recipe is that of DSR's launchers. It is that of configs/rae_dit.py, whose docstring has the
commands for encoder, decoder and statistics, except for the learning rate, 2e-4 for 40 epochs and
then linear to 2e-5 at epoch 800, gradients clipped to a norm of 1, EMA of 0.9995, and seed 42.
Encoder and head have 36 registers each, those of the encoder from block 8, or 4 in B and S.

    python -m dsr_jax.train --config=configs/rae_dit_dh.py --workdir=runs/rae_dit_dh_xl \
        --config.data.root=imagenet
    python -m dsr_jax.train --config=configs/rae_dit_dh.py:registers=0,ttr=False \
        --workdir=runs/rae_dit_dh_xl_baseline --config.data.root=imagenet

FID-50k that the paper reports for XL with SigLIP2-B after 800 epochs, without guidance: 2.91 for
the baseline and 2.72 with DSR; with guidance 2.77 and 2.62. XL has 838.7 M parameters (838.9 M with
registers) and 323.2 GFLOPs (359.3). The release continues to epoch 1400 at the final rate.

Arguments: `variant=S` (one of S, B, L and XL, the default; S is RAE's guide for autoguidance),
`encoder=siglip2-so400m` (as in configs/rae_dit.py), `registers=0` (default 36), `ttr=False` (no
test-time registers in the encoder), `epochs=1400` (default 800), `runlocal` (a smoke run of a few
steps on scikit-learn's digits, with a tiny autoencoder of random weights).
"""

from ml_collections import ConfigDict

from dsr_jax.config import base_config, choose, parse_arg, recipes
from dsr_jax.models.dit import REGISTER_START
from dsr_jax.models.dit_dh import DIT_DH


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config; see the module's docstring for `arg`."""
    args = parse_arg(
        arg,
        variant="XL",
        encoder="siglip2-base",
        registers=36,
        ttr=True,
        epochs=800,
        runlocal=False,
    )
    config = base_config()
    config.seed = 42

    config.model.name = "ditdh"
    config.model.update(choose(DIT_DH, "variant", args.variant))
    config.registers.num = args.registers
    config.registers.start = REGISTER_START[args.variant]

    recipes.use_imagenet(config, global_batch=1024)
    recipes.use_rae(config, args.encoder, test_time_registers=args.ttr)
    recipes.use_epochs(config, args.epochs)

    config.optim.schedule = "linear"
    config.optim.warmup_steps = 40 * recipes.IMAGENET_EPOCH
    config.optim.decay_end_steps = 800 * recipes.IMAGENET_EPOCH
    config.optim.final_lr = 2e-5
    config.optim.clip_norm = 1.0
    config.ema.decays = (0.9995,)
    config.sample.ema = "0.9995"

    if args.runlocal:
        config.model.update(
            hidden_size=32,
            depth=2,
            num_heads=2,
            decoder_hidden_size=48,
            decoder_depth=1,
            decoder_num_heads=2,
        )
        config.registers.num = min(args.registers, 4)
        config.registers.start = 1
        recipes.run_locally(config)
        recipes.use_tiny_rae(config)
        config.optim.warmup_steps = 2
        config.optim.decay_end_steps = 8
    return config
