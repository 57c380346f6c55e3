"""JiT-H/16 with diffusion registers on ImageNet 256x256, on pixels.

    python -m dsr_jax.train --config=configs/jit_h.py --workdir=runs/jit_h \
        --config.data.root=imagenet
    python -m dsr_jax.train --config=configs/jit_h.py:registers=0 --workdir=runs/jit_h_baseline \
        --config.data.root=imagenet

JiT's paper reports an FID-50k of 1.86 for H/16 after 600 epochs, with guidance. The registers'
paper reports 30.34 for JiT-H without registers: without guidance (--config.sample.guidance=1),
after fewer steps, a number that it does not give. Nor does it state whether registers were added to
the 32 class tokens or replaced them; here they are inserted at the same block, and `class_tokens=0`
replaces them. The recipe is that of JiT's trainer: image prediction with a velocity loss, a
learning rate of 5e-5 per 256 images after five epochs of warm-up, dropout 0.2 in the middle half of
H's blocks, two sets of EMA weights, a frozen position table; sampling by 49 Heun steps and one
Euler step, with guidance except in the first tenth of the time.

Arguments: `registers=0` (the baseline; default 36), `class_tokens=0` (none; default 32),
`variant=B-32` (B, L or H, with patches of 16 on images of 256 or of 32 on images of 512; default
H-16), `runlocal` (a smoke run of a few steps on scikit-learn's digits).
"""

from ml_collections import ConfigDict

from dsr_jax.config import base_config, choose, parse_arg, recipes
from dsr_jax.models.jit import JIT

GUIDANCE = {"B": 2.9, "L": 2.4, "H": 2.2}


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config; see the module's docstring for `arg`."""
    args = parse_arg(arg, registers=36, class_tokens=32, variant="H-16", runlocal=False)
    size, _, patch_size = args.variant.partition("-")
    config = base_config()

    config.model.name = "jit"
    config.model.update(choose(JIT, "variant", args.variant))
    config.model.use_qknorm = True
    config.model.num_class_tokens = args.class_tokens
    config.model.dropout = 0.2 if size == "H" else 0.0
    config.registers.num = args.registers
    config.registers.start = config.model.class_token_start

    recipes.use_imagenet(config, global_batch=1024)
    config.data.image_size = 16 * int(patch_size)

    # JiT's t runs the other way: its sigmoid(-0.8 + 0.8 N) is 1 - sigmoid(0.8 + 0.8 N).
    config.objective.time_distribution = "logit-normal_0.8_0.8"
    config.objective.noise_scale = 2.0 if patch_size == "32" else 1.0
    config.objective.clip_target = True

    config.optim.lr = 5e-5 * config.data.global_batch / 256
    config.optim.warmup_steps = 5 * recipes.IMAGENET_EPOCH
    config.optim.warmup_from_zero = True
    config.optim.warmup_offset = 0
    config.optim.freeze = ("*pos_embed",)
    config.ema.decays = (0.9999, 0.9996)
    config.train.steps = 600 * recipes.IMAGENET_EPOCH
    config.precision.compute = "bfloat16"

    config.sample.method = "heun-euler"
    config.sample.num_points = 51
    config.sample.guidance = GUIDANCE[size]
    config.sample.interval = (0.0, 0.9)
    config.sample.open_interval = True
    config.sample.uint8 = "round"

    if args.runlocal:
        config.model.update(hidden_size=32, depth=4, num_heads=2, patch_size=2, bottleneck_dim=8)
        config.model.num_class_tokens = min(args.class_tokens, 4)
        config.model.class_token_start = 1
        config.registers.num = min(args.registers, 4)
        config.registers.start = 2
        recipes.run_locally(config)
        config.optim.warmup_steps = 2
    return config
