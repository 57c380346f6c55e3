"""A small DiT in the latents of a representation autoencoder of scikit-learn's handwritten digits.

    python -m dsr_jax.train --config=configs/digits_rae.py --workdir=runs/digits_rae

By default the frozen networks have random weights; set config.space.encoder, .decoder, .statistics
and .neurons to others. `python tools/run_claims.py` makes such networks and trains variants of this
run on them, to test which of the paper's claims hold at the scale of a laptop.

Arguments: `registers=0` (the baseline; default 4), `runlocal` (a smoke run of a few
steps).
"""

from ml_collections import ConfigDict

from dsr_jax.config import base_config, parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config; see the module's docstring for `arg`."""
    args = parse_arg(arg, registers=4, runlocal=False)
    config = base_config()

    config.space.name = "rae"
    config.space.encoder = "random:tiny"
    config.space.decoder = "random:tiny"
    config.space.image_size = 16
    config.data.image_size = 16
    config.data.channels = 3
    config.data.global_batch = 128
    config.data.flip = False

    config.model.hidden_size = 128
    config.model.depth = 4
    config.model.num_heads = 4
    config.registers.num = args.registers
    config.registers.start = 1

    # 1,024 numbers hold what 64 pixels do: without the shift, noise hides the class at hardly any
    # time that training sees, and the label stays unused.
    config.objective.time_shift = (1_024 / 64) ** 0.5

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
        config.train.steps = 8
        config.data.global_batch = 16
        config.checkpoint.every_steps = 4
        config.log.every_steps = 2
        config.sample.num_points = 4
        config.sample.num = 10
        config.sample.every_steps = 8
    return config
