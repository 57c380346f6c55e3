"""Text-to-image with registers: Qwen2.5 and LightningDiT in SigLIP2-B's latents, as Scale-RAE.

The language model is trained, too. Its answer holds 256 learned queries, whose hidden states
condition the 256 latent tokens one by one. 36 registers join from block 8, with the mean of the
tokens' conditions. The recipe is Scale-RAE's, at the paper's batch and length: velocity loss,
logit-normal times shifted by sqrt(256 C / 4096), AdamW with a tenth of the rate on the language
model, 2048 images per step, 10,000 steps.

    python -m dsr_jax.convert siglip2 --source google/siglip2-base-patch16-256 \
        --out converted/siglip2-base
    python -m dsr_jax.convert decoder --source ViTXL_n08/model.pt \
        --out converted/siglip2-base-decoder
    python -m dsr_jax.convert qwen2 --source Qwen/Qwen2.5-1.5B-Instruct \
        --out converted/qwen2.5-1.5b
    python -m dsr_jax.train --config=configs/scale_rae.py --workdir=runs/scale_rae \
        --config.data.root=shards --config.language.tokenizer=Qwen2.5-1.5B-Instruct

Arguments: `language=0.5B` (one of 0.5B, 1.5B, the default, 3B and 7B), `variant=XL` (the denoiser:
2.4B, the default, or XL, ImageNet's), `encoder=siglip2-so400m` (the released models' encoder;
default siglip2-base), `registers=0` (default 36), `ttr=False` (no test-time registers in the
encoder), `frozen` (the language model is not trained), `steps=5000` (default 10000), `runlocal` (a
smoke run of a few steps on rendered shapes, with tiny networks of random weights).

Not published, and chosen here: size of both models, data order, guidance, and the rule for the
registers' condition. Scores of the paper: GenEval 42.6 without registers and 46.6 with, DPG-Bench
74.3 and 75.4. Source: spec t2i 1 to 4.
"""

from ml_collections import ConfigDict

from dsr_jax.config import base_config, choose, parse_arg, recipes
from dsr_jax.models.dit import DIT, TEXT_DIT
from dsr_jax.models.language import QWEN2

LATENT_CHANNELS = {"siglip2-base": 768, "siglip2-so400m": 1152}
TOKENIZER_ROWS = 151_667
"""Entries of Qwen2.5's tokenizer and the two words around an image."""


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config; see the module's docstring for `arg`."""
    args = parse_arg(
        arg,
        language="1.5B",
        variant="2.4B",
        encoder="siglip2-base",
        registers=36,
        ttr=True,
        frozen=False,
        steps=10_000,
        runlocal=False,
    )
    config = base_config()

    config.language.update(choose(QWEN2, "language", args.language))
    config.language.vocab_size = TOKENIZER_ROWS
    config.language.max_length = 512
    config.language.init_from = f"converted/qwen2.5-{args.language.lower()}"
    config.language.tokenizer = f"Qwen2.5-{args.language}-Instruct"
    sizes = choose({**TEXT_DIT, "XL": DIT["XL"]}, "variant", args.variant)
    config.model.update(sizes)
    config.registers.num = args.registers
    config.registers.start = 8

    channels = choose(LATENT_CHANNELS, "encoder", args.encoder)
    recipes.use_rae(config, args.encoder, test_time_registers=args.ttr)
    config.space.update(statistics="", preln=False)
    config.data.update(
        source="webdataset",
        image_size=256,
        channels=3,
        num_classes=1,
        global_batch=2048,
        flip=False,
        workers=8,
        on_corrupt="skip",
    )
    config.objective.prediction = "velocity"
    config.objective.time_shift = (256 * channels / 4_096) ** 0.5
    config.objective.time_range = (0.0, 1.0)

    config.optim.lr = 5.65e-4
    config.optim.groups = ((("language", "queries"), 0.1, 0.9, 0.999),)
    config.optim.freeze = ("denoiser/pos_embed",)
    config.optim.schedule = "cosine"
    config.optim.final_lr = 0.0
    config.optim.warmup_steps = round(0.0134 * args.steps)
    config.optim.warmup_from_zero = True
    config.optim.decay_end_steps = args.steps
    config.optim.clip_norm = 1.0
    if args.frozen:
        config.optim.freeze = ("denoiser/pos_embed", "language")
        config.objective.language_weight = 0.0
    config.ema.decays = ()
    config.train.steps = args.steps

    config.checkpoint.every_steps = 500
    config.checkpoint.keep_every = 2_000
    config.sample.ema = "none"
    config.sample.every_steps = 2_000
    config.sample.num = 16
    config.sample.num_points = 51
    config.sample.prompts = (
        "a photo of a cow",
        "a photo of two clocks",
        "a photo of a red apple left of a green cup",
        "a photo of a bench in the snow",
    )
    if args.runlocal:
        _run_locally(config)
    return config


def _run_locally(config: ConfigDict) -> None:
    """Shrinks networks and data to a few steps on rendered shapes."""
    config.language.update(
        hidden_size=16, depth=1, num_heads=2, num_kv_heads=1, mlp_dim=32, vocab_size=32
    )
    config.language.update(tied=True, init_from="", tokenizer="shapes", max_length=96)
    config.model.update(hidden_size=16, depth=2, num_heads=2, condition_width=16)
    config.registers.num = min(config.registers.num, 4)
    config.registers.start = 1
    recipes.run_locally(config)
    recipes.use_tiny_rae(config)
    config.space.image_size = 48
    config.data.update(source="shapes", image_size=48, num_classes=1, on_corrupt="error")
    config.objective.max_targets = 0
    config.optim.warmup_steps = 2
    config.sample.prompts = ("a photo of a red square",)
