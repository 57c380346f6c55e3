"""A small DiT in the latents of a representation autoencoder of scikit-learn's handwritten digits.

    python tools/run_claims.py --out=runs/claims
    python -m dsr_jax.train --config=configs/digits_rae.py --workdir=runs/digits_rae

The first command makes the folders that this config names (`stages`), and trains all variants of
this run to see which of the paper's claims hold at the scale of a laptop.

Arguments: `stages=DIR` (where the encoder, its decoder and statistics are), `variant=clean` (one of
clean, outlier and cured: which encoder, see tools/run_claims.py), `registers=4` (0 for none),
`runlocal` (a smoke run of a few steps with an encoder of random weights).
"""

from ml_collections import ConfigDict

from dsr_jax.config import base_config, parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config; see the module's docstring for `arg`."""
    args = parse_arg(arg, stages="runs/claims/stages", variant="clean", registers=4, runlocal=False)
    config = base_config()

    config.space.name = "rae"
    encoder = "clean" if args.variant == "clean" else "outlier"
    config.space.encoder = f"{args.stages}/encoder_{encoder}"
    config.space.decoder = f"{args.stages}/decoder_{args.variant}"
    config.space.statistics = f"{args.stages}/statistics_{args.variant}"
    if args.variant == "cured":
        config.space.neurons = f"{args.stages}/neurons.json"
    config.space.image_size = 16
    config.data.image_size = 16
    config.data.channels = 3
    config.data.global_batch = 128
    config.data.flip = False

    config.model.hidden_size = 64
    config.model.depth = 4
    config.model.num_heads = 4
    config.registers.num = args.registers
    config.registers.start = 1

    config.optim.lr = 2e-3
    config.optim.schedule = "cosine"
    config.optim.final_lr = 1e-5
    config.optim.warmup_steps = 50
    config.optim.warmup_from_zero = True
    config.optim.decay_end_steps = 1_000
    config.optim.clip_norm = 1.0
    config.ema.decays = (0.995,)
    config.train.steps = 1_000

    config.checkpoint.every_steps = 500
    config.log.every_steps = 100
    config.sample.ema = "0.995"
    config.sample.every_steps = 1_000
    config.sample.num = 100
    config.sample.batch = 100
    config.sample.guidance = 1.5

    if args.runlocal:
        config.space.update(encoder="random:tiny", decoder="", statistics="", image_size=32)
        config.train.steps = 8
        config.data.global_batch = 16
        config.checkpoint.every_steps = 4
        config.log.every_steps = 2
        config.sample.every_steps = 0
    return config
