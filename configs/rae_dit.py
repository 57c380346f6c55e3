"""RAE-DiT with dual-stage registers: LightningDiT in a frozen encoder's latents, ImageNet 256x256.

The recipe is that of DSR's six launchers: normalized latents of 16 x 16 tokens; data prediction
with a velocity loss, logit-normal times shifted by the square root of 48; AdamW at a constant 2e-4,
1024 images per step, no clipping, EMA of 0.9999; 49 Euler steps without guidance. Both kinds of
registers are on: those of the encoder, trained ones in DINOv2 and test-time ones in SigLIP2, and 36
in the denoiser, from block 8 in XL and L, and from block 4 in B and S.

The encoder, a decoder and statistics of the latents (the last two are DSR's and RAE's files):

    python -m dsr_jax.convert siglip2 --source google/siglip2-base-patch16-256 \
        --out converted/siglip2-base
    python -m dsr_jax.convert decoder --source ViTXL_n08/model.pt \
        --out converted/siglip2-base-decoder
    python -m dsr_jax.convert statistics --source stat.pt \
        --out converted/siglip2-base-statistics.safetensors
    python -m dsr_jax.convert statistics --source siglipv2_tt_reg_with_max/normalization_stats.pt \
        --out converted/siglip2-base-ttr-statistics.safetensors

and likewise for `siglip2-so400m` (google/siglip2-so400m-patch14-224), `dinov2-with-registers-base`
(convert dinov2 of facebook/dinov2-with-registers-base) and `dinov2-base`. Then a run, its baseline,
and the smaller sizes:

    python -m dsr_jax.train --config=configs/rae_dit.py --workdir=runs/rae_dit_xl \
        --config.data.root=imagenet
    python -m dsr_jax.train --config=configs/rae_dit.py:registers=0,ttr=False \
        --workdir=runs/rae_dit_xl_baseline --config.data.root=imagenet
    python -m dsr_jax.train --config=configs/rae_dit.py:variant=B,epochs=80 \
        --workdir=runs/rae_dit_b --config.data.root=imagenet

FID-50k that the paper reports with SigLIP2-B, without guidance, and with it in brackets:

    variant  epochs  baseline     with DSR     GFLOPs         parameters
    S        80      28.03        23.93        12.4, 13.7     33.6 M
    B        80      20.36        9.81         46.6, 51.2     131.9 M
    XL       80      5.89         4.58         238.1, 262.9   677.2 M (676 trained by intent)
    XL       800     3.85 (3.58)  3.26 (2.97)

The first 80 epochs of a run of 800 equal a run of 80, since the learning rate is constant. The
paper also has rows for So400M and DINOv2; its release has the recipe of the former.

Arguments: `variant=B` (one of S, B, L and XL, the default), `encoder=siglip2-so400m` (one of
siglip2-base, the default, siglip2-so400m, dinov2-with-registers-base and dinov2-base),
`registers=0` (default 36), `ttr=False` (no test-time registers in the encoder), `epochs=80`
(default 800), `runlocal` (a smoke run of a few steps on scikit-learn's digits, with a tiny
autoencoder of random weights).
"""

from ml_collections import ConfigDict

from dsr_jax.config import base_config, choose, parse_arg, recipes
from dsr_jax.models.dit import DIT, REGISTER_START


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

    config.model.update(choose(DIT, "variant", args.variant))
    config.registers.num = args.registers
    config.registers.start = REGISTER_START[args.variant]

    recipes.use_imagenet(config, global_batch=1024)
    recipes.use_rae(config, args.encoder, test_time_registers=args.ttr)
    recipes.use_epochs(config, args.epochs)

    if args.runlocal:
        config.model.update(hidden_size=32, depth=2, num_heads=2)
        config.registers.num = min(args.registers, 4)
        config.registers.start = 1
        recipes.run_locally(config)
        recipes.use_tiny_rae(config)
    return config
