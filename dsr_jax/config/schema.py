"""Every key that a config can have: its default, what it means, and whether a run may change it.

A change between two starts of one run is sorted by what it does (the resume contract):

- `free`: memory, speed, reporting, length, learning rate. The run continues; the log names it.
- `ask`: what is learned, and from what. The run continues where `--allow-change KEY` asks for it.
- `never`: names and shapes of the parameters, or what they mean. Nothing can be continued.
"""

import enum
import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from ml_collections import ConfigDict


class Change(enum.Enum):
    """Whether a key may differ between two starts of one run."""

    FREE = "free"
    ASK = "ask"
    NEVER = "never"


class Key(NamedTuple):
    """One key of the config.

    Attributes:
      default: Default value, whose type is enforced.
      meaning: Description in one line.
      change: Whether a run may change it.
    """

    default: Any
    meaning: str
    change: Change


def free(default: Any, meaning: str) -> Key:
    """Returns a key that may change between two starts."""
    return Key(default, meaning, Change.FREE)


def ask(default: Any, meaning: str) -> Key:
    """Returns a key that changes only where the user asks for it."""
    return Key(default, meaning, Change.ASK)


def never(default: Any, meaning: str) -> Key:
    """Returns a key that is fixed from the first start on."""
    return Key(default, meaning, Change.NEVER)


# Defaults are the paper's recipe where it has one (spec denoiser 8).
SCHEMA: Mapping[str, Key] = MappingProxyType(
    {
        "seed": ask(0, "seed of initialization, data order, noise, times and dropout"),
        "model.name": never("lightningdit", "denoiser: lightningdit, ditdh, sit or jit"),
        "model.hidden_size": never(384, "width D of the tokens"),
        "model.depth": never(12, "blocks"),
        "model.num_heads": never(6, "attention heads per block"),
        "model.patch_size": never(1, "side of a patch, in pixels or latent positions"),
        "model.mlp_ratio": never(4.0, "hidden width of the MLP over hidden_size"),
        "model.learn_sigma": never(False, "double the output channels and use the first half"),
        "model.use_qknorm": never(False, "normalize queries and keys"),
        "model.use_swiglu": never(True, "SwiGLU in place of GELU in the MLP"),
        "model.use_rope": never(True, "rotary position embedding"),
        "model.use_rmsnorm": never(True, "RMSNorm in place of LayerNorm"),
        "model.final_norm": never(True, "norm before the output layer"),
        "model.attn_kv_bias": never(False, "extra key and value per head without a token"),
        "model.remat": free(
            "auto", "what is recomputed: none, dots, full, or auto for the least that fits"
        ),
        "model.unroll": free(
            "auto", "unroll the depth: auto (by platform), full, or none for a loop"
        ),
        "model.attention": free(
            "auto",
            "attention kernel: auto, einsum, xla, cudnn, splash, or triton (for GPUs; not timed)",
        ),
        "model.kernels": free("xla", "element-wise parts of a block: xla, or triton on a GPU"),
        "model.decoder_hidden_size": never(2048, "ditdh: width of the head"),
        "model.decoder_depth": never(2, "ditdh: blocks of the head"),
        "model.decoder_num_heads": never(16, "ditdh: attention heads of the head"),
        "model.use_pos_embed": never(True, "ditdh: position table of its encoder"),
        "model.bottleneck_dim": never(128, "jit: width between the patches and the tokens"),
        "model.num_class_tokens": never(32, "jit: class tokens"),
        "model.class_token_start": never(4, "jit: block from which the class tokens are there"),
        "model.dropout": free(0.0, "jit: dropout in the blocks of the middle half"),
        "model.condition_width": never(0, "text: width of a token's condition; 0: hidden_size"),
        "model.condition_silu": never(True, "text: SiLU on time plus text"),
        "registers.num": never(36, "diffusion registers R; 0 for none"),
        "registers.start": never(4, "block from which they are there"),
        "registers.gate": never(False, "gate for registers added by tools/add_registers.py"),
        "registers.condition": never("mean", "text: their rows: mean, time, learned or query"),
        "language.hidden_size": never(0, "width of the language model; 0: classes, no text"),
        "language.depth": never(28, "language model: blocks"),
        "language.num_heads": never(12, "language model: attention heads of queries"),
        "language.num_kv_heads": never(2, "language model: heads of keys and values"),
        "language.mlp_dim": never(8960, "language model: hidden width of the MLP"),
        "language.vocab_size": never(151936, "language model: rows of the token table"),
        "language.tied": never(True, "language model: logits by the token table"),
        "language.connector": never("linear", "language model to denoiser: linear or mlp2"),
        "language.understanding": never(False, "projector of images that a conversation shows"),
        "language.remat": free(
            "auto", "language model: as model.remat, and with it if both are auto"
        ),
        "language.tokenizer": ask("shapes", "folder of the tokenizer, or shapes"),
        "language.max_length": ask(512, "tokens of a sequence, with the image's slots"),
        "language.init_from": ask("", "converted language model that a new run starts from"),
        "space.name": never("pixels", "what is diffused: pixels, vae or rae"),
        "space.vae": ask("", "vae: folder of the converted autoencoder"),
        "space.scale": ask(0.18215, "vae: factor on its latents"),
        "space.shift": ask(0.0, "vae: taken from its latents before the factor"),
        "space.encoder": ask("", "rae: folder of the converted encoder, or random:NAME"),
        "space.decoder": free("", "rae: folder of its decoder; needed for samples only"),
        "space.statistics": ask("", "rae: file of the latents' mean and variance"),
        "space.neurons": ask("", "rae: register neurons, a published name or a file; empty: none"),
        "space.image_size": never(0, "rae: side of the encoder's input; 0 for 16 patches a side"),
        "space.num_registers": ask(1, "rae: test-time registers"),
        "space.register_scale": ask((1.0,), "rae: factor on the value that each register gets"),
        "space.normal_values": ask("zero", "rae: patches keep: zero, mean, only_outliers or same"),
        "space.shared_maximum": ask(True, "rae: one value per block, the maximum over its neurons"),
        "space.spare_first_token": ask(True, "rae: token 0 keeps its activations"),
        "space.noise_tau": ask(0.0, "rae: largest standard deviation of noise on latents"),
        "space.norm_scaled_noise": ask(False, "rae: noise in proportion to the token's norm"),
        "space.post_stat_norm": ask(False, "rae: noise and norms after normalization"),
        "space.preln": ask(False, "rae: tokens before the encoder's final norm"),
        "space.eps": ask(1e-5, "rae: added to the variance of latents"),
        "data.source": ask("digits", "digits, synthetic, folder, arrayrecord, tfds:NAME, ..."),
        "data.root": ask("", "folder or archive of the source"),
        "data.latents": ask("", "folder of python -m dsr_jax.encode cache, in place of images"),
        "data.split": ask("train", "part of the source to train on"),
        "data.image_size": never(8, "side of the images in pixels"),
        "data.channels": never(1, "1 for gray images, 3 for color"),
        "data.num_classes": never(10, "rows of the label table, without the null class"),
        "data.class_map": ask("", "folder: file of class names in the order of their labels"),
        "data.global_batch": ask(1024, "images per step over all devices"),
        "data.flip": ask(True, "mirror half of the images"),
        "data.crop_from": ask(0, "resize the shorter side to this and crop at random; 0 for none"),
        "data.workers": free(0, "processes that load images; 0 loads in threads"),
        "data.on_corrupt": free("error", "unreadable images: error, or skip and count them"),
        "objective.path": ask("linear", "interpolation between data and noise: linear, ..."),
        "objective.prediction": ask(
            "data", "what the network predicts: data, velocity, noise or score"
        ),
        "objective.loss_weight": ask(
            "", "weight of the loss over t: velocity or likelihood; empty: 1"
        ),
        "objective.time_distribution": ask("logit-normal_0_1", "distribution of training times"),
        "objective.time_shift": ask(1.0, "factor on the odds of t, in training and sampling"),
        "objective.time_range": ask((), "lowest and highest t; empty for the prediction's own"),
        "objective.noise_scale": ask(1.0, "standard deviation of the noise at t = 1"),
        "objective.clip_target": ask(False, "bound the time that divides the target, as JiT does"),
        "objective.outlier_norm": ask(0.0, "rae: no loss on tokens of at least this norm; 0: all"),
        "objective.norm_shift": ask(False, "rae: loss weights as of a time shift by the norm"),
        "objective.norm_shift_logit_normal": ask(False, "rae: the same for logit-normal times"),
        "objective.label_dropout": ask(0.1, "fraction of labels replaced by no class"),
        "objective.times": ask(1, "times that are trained per sample and step"),
        "objective.language_weight": ask(1.0, "text: weight of the next-token loss; 0: none"),
        "objective.diffusion_weight": ask(2.0, "text: weight of the diffusion loss"),
        "objective.max_targets": free(64, "text: positions with logits per sample; 0 for all"),
        "objective.time_bins": free(8, "intervals of t for which losses are logged"),
        "optim.lr": free(2e-4, "highest learning rate"),
        "optim.b1": free(0.9, "AdamW: decay of the first moment"),
        "optim.b2": free(0.95, "AdamW: decay of the second moment"),
        "optim.eps": free(1e-8, "AdamW: added to the root of the second moment"),
        "optim.weight_decay": free(0.0, "AdamW: decoupled weight decay; 0 for none"),
        "optim.groups": free((), "groups ((PATTERN, ...), factor on lr, b1, b2) of parameters"),
        "optim.schedule": free("constant", "learning rate: constant, linear or cosine decay"),
        "optim.final_lr": free(2e-4, "learning rate at the end of the decay"),
        "optim.warmup_steps": free(0, "steps before the decay"),
        "optim.warmup_from_zero": free(False, "the rate rises linearly over warmup_steps"),
        "optim.warmup_offset": free(1, "added to the step while it rises: 1 as DSR, 0 as JiT"),
        "optim.decay_end_steps": free(0, "step at which the decay ends"),
        "optim.clip_norm": free(0.0, "largest norm of the gradients; 0 for no clipping"),
        "optim.accumulate": free(1, "micro-batches per step: less memory, the same gradients"),
        "optim.freeze": ask((), "patterns of parameters that are not trained"),
        "ema.decays": free((0.9999,), "decays of the EMA weights; each costs a copy of them"),
        "train.steps": free(100_080, "length of the run in steps"),
        "train.stop_after_steps": free(0, "end this start after so many steps; 0 for no limit"),
        "train.skip_steps": free((), "steps whose batches are skipped, as (1200, 1201)"),
        "train.init_from": free("", "converted folder whose weights a new run starts from"),
        "train.init_labels": free(
            "", "label table of init_from: names, extend, reset or unconditional; empty: as it is"
        ),
        "train.init_class_map": free("", "class names of init_from, one per line, for init_labels"),
        "train.init_positions": free("", "resample: position table of init_from to this grid"),
        "mesh.data": free(-1, "devices over which the batch is split; -1 for all that are left"),
        "mesh.fsdp": free(1, "devices over which batch and parameters are split"),
        "mesh.tensor": free(1, "devices over which heads and hidden units are split"),
        "mesh.dcn_data": free(-1, "the part of mesh.data across TPU slices; -1 for all slices"),
        "mesh.dcn_fsdp": free(1, "the part of mesh.fsdp across TPU slices"),
        "sharding.rules": free("fsdp", "where logical axes are split: fsdp, zero1 or replicated"),
        "sharding.overrides": free((), "changes to these rules"),
        "sharding.gather_once": free(False, "gather kernels once for both passes, and keep them"),
        "sharding.xla_options": free((), "name=value, for the compiler of the training step"),
        "precision.compute": free("float32", "dtype of matmul inputs: float32 or bfloat16"),
        "precision.residual": free("float32", "dtype of the residual stream: float32 or bfloat16"),
        "precision.matmul": free("default", "arithmetic of float32 matmuls, as JAX names it"),
        "checkpoint.every_steps": free(5_000, "steps between checkpoints"),
        "checkpoint.keep_latest": free(2, "newest checkpoints that stay"),
        "checkpoint.keep_every": free(25_000, "checkpoints at multiples of this stay; 0 for none"),
        "checkpoint.restore_step": free(-1, "go back to this step once; -1 for the newest"),
        "checkpoint.save_seconds": free(1200.0, "longest time that a save may take"),
        "failures.lost_seconds": free(90.0, "silence after which a process counts as lost"),
        "failures.step_seconds": free(900.0, "longest step with its batch; 0 for no limit"),
        "failures.pause_seconds": free(7200.0, "longest start, compilation or evaluation; 0: none"),
        "failures.end_hung": free(True, "end a run that hangs, so that it can be started again"),
        "failures.on_nonfinite": free("stop", "batches that are not finite: stop, or skip them"),
        "failures.check_replicas": free(True, "compare the replicas of the state between devices"),
        "log.every_steps": free(100, "steps between records of metrics.jsonl"),
        "log.tensorboard": free(False, "also write TensorBoard events"),
        "log.wandb": free("", "project of Weights & Biases to write to; empty for none"),
        "log.outliers": free(0, "steps between outlier statistics of the denoiser; 0 for none"),
        "log.outlier_images": free(8, "images that they are measured on"),
        "log.outlier_times": free(
            (0.1, 0.3, 0.5, 0.7, 0.9), "noise levels (0 data, 1 noise) that they are measured at"
        ),
        "log.profile_start": free(0, "first step that is traced"),
        "log.profile_steps": free(0, "steps that are traced; 0 for none"),
        "sample.every_steps": free(10_000, "steps between grids of samples; 0 for none"),
        "sample.num": free(64, "samples of a grid"),
        "sample.batch": free(64, "samples that are made at once; -1: as many as fit"),
        "sample.ema": free("0.9999", "decay of the EMA weights that sample; none for the weights"),
        "sample.method": free("euler", "euler, heun, dopri5, sde-euler, ..., or module:function"),
        "sample.num_points": free(50, "points of the time grid, one more than solver steps"),
        "sample.guidance": free(1.0, "scale of classifier-free guidance or autoguidance; 1: none"),
        "sample.autoguidance": free(
            "", "folder of the weaker denoiser that guides: run or converted"
        ),
        "sample.guidance_channels": free(0, "guide only the first so many channels; 0 for all"),
        "sample.interval": free((0.0, 1.0), "times (0 data, 1 noise) in which guidance is on"),
        "sample.open_interval": free(False, "leave out the interval's ends, as JiT does"),
        "sample.seed": free(0, "seed of the samples' noise"),
        "sample.prompts": free((), "text: prompts of a run's grids"),
        "sample.text": free("forced", "text: forced, or greedy for the model's own words"),
        "sample.all_classes": free(False, "also sample classes that training had no images of"),
        "sample.uint8": free("truncate", "cast of images to uint8: truncate, round or sit"),
        "sample.rtol": free(1e-3, "dopri5: relative tolerance"),
        "sample.atol": free(1e-6, "dopri5: absolute tolerance"),
        "sample.sde_form": free("sigma", "sde: form of the diffusion coefficient"),
        "sample.sde_norm": free(1.0, "sde: scale of the diffusion coefficient"),
        "sample.last_step": free("mean", "sde: last step: mean, euler, tweedie or none"),
        "sample.last_step_size": free(0.04, "sde: size of the last step in t"),
        "eval.classifier": free(
            "", "data set whose classifier scores samples: digits; empty: none"
        ),
        "eval.num_samples": free(0, "samples that are scored"),
        "eval.split": free("heldout", "part of the source that the scores compare with"),
        "eval.every_steps": free(0, "steps between scores; 0 for the end of the run alone"),
        "eval.metrics": free(("fid",), "metrics of python -m dsr_jax.evaluate"),
        "eval.reference": free("", "file of reference statistics; empty for no metrics"),
        "eval.inception": free("", "folder of the converted Inception network"),
        "eval.dinov2": free("", "folder of the converted DINOv2 network"),
        "eval.batch": free(64, "images per batch of the feature network"),
        "decoder.hidden_size": never(0, "train_decoder: width of the decoder; 0 for a denoiser"),
        "decoder.depth": never(28, "train_decoder: blocks"),
        "decoder.num_heads": never(16, "train_decoder: attention heads per block"),
        "decoder.mlp_dim": never(4096, "train_decoder: hidden width of the MLP"),
        "decoder.patch_size": never(16, "train_decoder: side of a patch in pixels"),
        "decoder.remat": free("auto", "train_decoder: as model.remat"),
        "decoder.unroll": free("auto", "train_decoder: as model.unroll"),
        "lpips.folder": ask("", "train_decoder: folder of the converted LPIPS network"),
        "lpips.weight": ask(1.0, "train_decoder: weight of LPIPS relative to L1; 0 for none"),
        "gan.backbone": ask("", "train_decoder: folder of the discriminator's frozen backbone"),
        "gan.weight": ask(0.75, "train_decoder: weight of the GAN's loss; 0 for no GAN"),
        "gan.max_adaptive_weight": ask(1e4, "train_decoder: bound of the adaptive weight"),
        "gan.loss": ask("hinge", "train_decoder: the discriminator's loss, hinge or vanilla"),
        "gan.kernel_size": never(9, "train_decoder: kernel size of the discriminator's heads"),
        "gan.key_depths": never((2, 5, 8, 11), "train_decoder: backbone blocks that heads read"),
        "gan.cutout": ask(0.0, "train_decoder: side of the cutout in the discriminator's inputs"),
        "gan.discriminator_start": ask(0, "train_decoder: first step of the discriminator"),
        "gan.generator_start": ask(0, "train_decoder: first step of the GAN's loss"),
    }
)


def base_config() -> ConfigDict:
    """Returns every key with its default."""
    config = ConfigDict()
    for name, key in SCHEMA.items():
        *sections, last = name.split(".")
        section = config
        for part in sections:
            if part not in section:
                section[part] = ConfigDict()
            section = section[part]
        section[last] = key.default
    return config.lock()


def leaves(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Lists (dotted key, value) of all leaves."""
    found: list[tuple[str, Any]] = []
    for key, value in config.items():
        if isinstance(value, (ConfigDict, dict)):
            found += leaves(value, f"{prefix}{key}.")
        else:
            found.append((f"{prefix}{key}", value))
    return found


def to_json(config: ConfigDict) -> dict[str, Any]:
    """Returns plain values; tuples become lists."""
    return json.loads(json.dumps(config.to_dict()))
