"""Text-to-image with diffusion registers on rendered scenes of colored shapes, from scratch.

Language model, queries and denoiser are trained together on two CPU cores, without any download.

    python -m dsr_jax.train --config=configs/shapes_t2i.py --workdir=runs/shapes
    python -m dsr_jax.train --config=configs/shapes_t2i.py:noregisters --workdir=runs/shapes_base
    python -m dsr_jax.sample --workdir=runs/shapes --guidance=2 --prompt="a photo of a red square"

Arguments: `noregisters` (the baseline), `steps=8000` (the learning rate decays until then),
`runlocal` (a smoke run of a few steps).

The denoiser works on patches of 8 x 8 pixels and predicts the image, as JiT does: its width is less
than a patch's 192 numbers, with which a velocity cannot be written.

Every pixel of a patch shows the same object, so that noise hides objects late: from one patch alone
the best denoiser is sure of its object below t = 0.6, half sure at 0.8, and guesses above 0.95.
Logit-normal times without a shift spend two thirds of training, and 94% of the loss's weight 1 /
t^2, below 0.6, where nothing is left to decide; multiplying the odds of t by 10 makes that 3% and
9%, and puts half of the sampler's steps, in place of a third, between 0.6 and 0.95. Where objects
stand is decided above 0.9: half of all times are there, in place of one in seventy. Two times of
each caption halve the language model's share of a step.

Source: spec t2i 10.
"""

from ml_collections import ConfigDict

from dsr_jax.config import base_config, parse_arg

TIME_SHIFT = 10.0
"""Factor on the odds of t: the median is 0.91, where arrangement and objects are undecided."""


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config; see the module's docstring for `arg`."""
    args = parse_arg(arg, noregisters=False, steps=8_000, runlocal=False)
    config = base_config()

    config.language.hidden_size = 96
    config.language.depth = 3
    config.language.num_heads = 4
    config.language.num_kv_heads = 2
    config.language.mlp_dim = 256
    config.language.vocab_size = 32
    config.language.tokenizer = "shapes"
    # Image and two control words, and 17 words; the longest caption has 11.
    config.language.max_length = 28

    config.model.hidden_size = 96
    config.model.patch_size = 8
    config.model.depth = 4
    config.model.num_heads = 4
    config.registers.num = 0 if args.noregisters else 4
    config.registers.start = 1

    config.data.source = "shapes"
    config.data.image_size = 24
    config.data.channels = 3
    config.data.num_classes = 1
    config.data.global_batch = 32
    config.data.flip = False

    config.objective.max_targets = 0
    config.objective.label_dropout = 0.1
    config.objective.time_range = (0.0, 1.0)
    config.objective.time_shift = TIME_SHIFT
    config.objective.times = 2

    config.optim.lr = 2e-3
    config.optim.schedule = "cosine"
    config.optim.final_lr = 0.0
    config.optim.warmup_steps = 100
    config.optim.warmup_from_zero = True
    config.optim.decay_end_steps = args.steps
    config.optim.clip_norm = 1.0
    config.ema.decays = (0.998,)
    config.train.steps = args.steps

    config.checkpoint.every_steps = 1_000
    config.log.every_steps = 100
    config.sample.ema = "0.998"
    config.sample.every_steps = args.steps // 3
    config.sample.prompts = (
        "a photo of a red square",
        "a photo of a green cross",
        "a photo of three blue frames",
        "a photo of a yellow triangle left of a cyan square",
    )
    config.sample.num = 16
    config.sample.num_points = 31
    config.sample.guidance = 2.0

    if args.runlocal:
        config.language.hidden_size = 16
        config.language.depth = 1
        config.language.mlp_dim = 32
        config.model.hidden_size = 16
        config.model.depth = 2
        config.train.steps = 8
        config.data.global_batch = 16
        config.checkpoint.every_steps = 4
        config.log.every_steps = 2
        config.sample.every_steps = 8
        config.sample.num = 4
        config.sample.num_points = 4
    return config
