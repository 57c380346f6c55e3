"""A small pixel-space DiT with diffusion registers on scikit-learn's handwritten digits.

The main job of the README: real scans, no download, minutes on a laptop CPU.

    python -m dsr_jax.train --config=configs/digits.py --workdir=runs/digits
    python -m dsr_jax.train --config=configs/digits.py:noregisters --workdir=runs/digits_baseline

Arguments: `noregisters` (the baseline), `runlocal` (a smoke run of a few steps).
"""

from ml_collections import ConfigDict

from dsr_jax.config import base_config, parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config; see the module's docstring for `arg`."""
    args = parse_arg(arg, noregisters=False, runlocal=False)
    config = base_config()

    config.model.hidden_size = 64
    config.model.patch_size = 2
    config.model.depth = 4
    config.model.num_heads = 4
    config.registers.num = 0 if args.noregisters else 4
    config.registers.start = 1

    config.data.global_batch = 128
    config.data.flip = False

    config.optim.lr = 2e-3
    config.optim.schedule = "cosine"
    config.optim.final_lr = 1e-5
    config.optim.warmup_steps = 50
    config.optim.warmup_from_zero = True
    config.optim.decay_end_steps = 1_200
    config.optim.clip_norm = 1.0
    config.ema.decays = (0.995,)
    config.train.steps = 1_200

    config.checkpoint.every_steps = 400
    config.log.every_steps = 50
    config.sample.ema = "0.995"
    config.sample.every_steps = 600
    config.sample.num = 100
    config.sample.guidance = 1.5
    config.eval.judge = "digits"
    config.eval.num_samples = 500

    if args.runlocal:
        config.train.steps = 8
        config.data.global_batch = 16
        config.checkpoint.every_steps = 4
        config.log.every_steps = 2
        config.sample.num_points = 4
        config.sample.num = 10
        config.eval.num_samples = 20
    return config
