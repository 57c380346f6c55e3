"""A small pixel-space DiT with diffusion registers on scikit-learn's handwritten digits.

The main example of the README: real scans, no download, minutes on a laptop CPU.

    python -m dsr_jax.train --config=configs/digits.py --workdir=runs/digits
    python -m dsr_jax.train --config=configs/digits.py:noregisters --workdir=runs/digits_baseline
    python -m dsr_jax.train --config=configs/digits.py:family=jit --workdir=runs/digits_jit

Arguments: `noregisters` (the baseline), `family=ditdh`, `family=sit`, `family=jit` (another of the
paper's denoisers, with the loss, times and sampler of its own recipe, at the same width, depth and
registers; default lightningdit), `steps=800` (default 1,200; the learning rate decays until then),
`runlocal` (a smoke run of a few steps).
"""

from ml_collections import ConfigDict

from dsr_jax.config import base_config, choose, parse_arg
from dsr_jax.models.registry import DENOISERS
from dsr_jax.models.sit import SIT


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config; see the module's docstring for `arg`."""
    args = parse_arg(arg, noregisters=False, family="lightningdit", steps=1_200, runlocal=False)
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
    config.optim.decay_end_steps = args.steps
    config.optim.clip_norm = 1.0
    config.ema.decays = (0.995,)
    config.train.steps = args.steps

    config.checkpoint.every_steps = 400
    config.log.every_steps = 50
    config.sample.ema = "0.995"
    config.sample.every_steps = args.steps // 2
    config.sample.num = 100
    config.sample.guidance = 1.5
    config.eval.classifier = "digits"
    config.eval.num_samples = 500
    _use_family(config, args.family)

    if args.runlocal:
        config.train.steps = 8
        config.data.global_batch = 16
        config.checkpoint.every_steps = 4
        config.log.every_steps = 2
        config.sample.num_points = 4
        config.sample.num = 10
        config.eval.num_samples = 20
    return config


def _use_family(config: ConfigDict, family: str) -> None:
    """Sets the denoiser and its recipe; sizes and learning rate stay."""
    choose(DENOISERS, "family", family)
    config.model.name = family
    if family == "ditdh":
        config.model.update(decoder_hidden_size=128, decoder_depth=1, decoder_num_heads=8)
    elif family == "sit":
        sizes = {"hidden_size", "depth", "num_heads"}
        config.model.update({key: SIT["S"][key] for key in SIT["S"].keys() - sizes})
        config.objective.update(
            prediction="velocity", time_distribution="uniform", time_range=(0.0, 1.0)
        )
        config.optim.freeze = ("*pos_embed",)
        config.sample.update(method="sde-euler", num_points=250, uint8="sit")
    elif family == "jit":
        config.model.update(bottleneck_dim=16, num_class_tokens=4, class_token_start=1)
        config.model.use_qknorm = True
        config.objective.update(time_distribution="logit-normal_0.8_0.8", clip_target=True)
        config.optim.freeze = ("*pos_embed",)
        config.sample.update(method="heun-euler", num_points=51, uint8="round")
        config.sample.update(interval=(0.0, 0.9), open_interval=True)
