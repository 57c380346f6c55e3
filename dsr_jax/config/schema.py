"""Every key that a config can have, with its default."""

import json
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict


def base_config() -> ConfigDict:
    """Returns every key with its default: the paper's recipe where it has one (spec denoiser 8)."""
    return ConfigDict(
        {
            "seed": 0,
            "model": {
                "name": "lightningdit",
                "hidden_size": 384,
                "depth": 12,
                "num_heads": 6,
                "patch_size": 1,
                "mlp_ratio": 4.0,
                "learn_sigma": False,
                "use_qknorm": False,
                "use_swiglu": True,
                "use_rope": True,
                "use_rmsnorm": True,
                "final_norm": True,
                "attn_kv_bias": False,
                "remat": "none",
                "attention": "auto",
                # Of "ditdh" alone: its wide head, and the encoder's table.
                "decoder_hidden_size": 2048,
                "decoder_depth": 2,
                "decoder_num_heads": 16,
                "use_pos_embed": True,
                # Of "jit" alone: its patches, its class tokens, and dropout in the middle.
                "bottleneck_dim": 128,
                "num_class_tokens": 32,
                "class_token_start": 4,
                "dropout": 0.0,
            },
            # The gate is for registers that join a trained network: tools/add_registers.py.
            "registers": {"num": 36, "start": 4, "gate": False},
            # Behind vae and scale all is for "rae", whose image_size 0 is 16 patches a side.
            "space": {
                "name": "pixels",
                "vae": "",
                "scale": 0.18215,
                "encoder": "",
                "decoder": "",
                "statistics": "",
                "neurons": "",
                "image_size": 0,
                "num_registers": 1,
                "register_scale": (1.0,),
                "normal_values": "zero",
                "shared_maximum": True,
                "spare_first_token": True,
                "noise_tau": 0.0,
                "norm_scaled_noise": False,
                "post_stat_norm": False,
                "preln": False,
                "eps": 1e-5,
            },
            "data": {
                "source": "digits",
                "root": "",
                # A folder of python -m dsr_jax.encode cache, read instead of images.
                "latents": "",
                "split": "train",
                "image_size": 8,
                "channels": 1,
                "num_classes": 10,
                "global_batch": 1024,
                "flip": True,
                "crop_from": 0,
                "workers": 0,
                "on_corrupt": "error",
            },
            "objective": {
                "path": "linear",
                "prediction": "data",
                "loss_weight": "",
                "time_distribution": "logit-normal_0_1",
                "time_shift": 1.0,
                "time_range": (),
                "noise_scale": 1.0,
                "clip_target": False,
                # Of "rae" alone: no loss where a token's norm is at least this, 0 for none; and
                # weights as of a time shift in proportion to the norm. Norms are all equal
                # without config.space.post_stat_norm or preln.
                "outlier_norm": 0.0,
                "norm_shift": False,
                "norm_shift_logit_normal": False,
                "label_dropout": 0.1,
                "time_bins": 8,
            },
            "optim": {
                "lr": 2e-4,
                "b1": 0.9,
                "b2": 0.95,
                "eps": 1e-8,
                "weight_decay": 0.0,
                "schedule": "constant",
                "final_lr": 2e-4,
                "warmup_steps": 0,
                "warmup_from_zero": False,
                "warmup_offset": 1,
                "decay_end_steps": 0,
                "clip_norm": 0.0,
                "accumulate": 1,
                "freeze": (),
            },
            "ema": {"decays": (0.9999,)},
            # init_from is a converted folder, whose weights a new run of a denoiser starts from.
            "train": {"steps": 100_080, "stop_after_steps": 0, "init_from": ""},
            # dcn_data and dcn_fsdp: the parts of data and fsdp that lie in different TPU slices.
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1, "dcn_data": -1, "dcn_fsdp": 1},
            # xla_options are "name=value", for the compiler of the training step.
            "sharding": {"rules": "fsdp", "overrides": (), "xla_options": ()},
            "precision": {"compute": "float32", "matmul": "default"},
            "checkpoint": {
                "every_steps": 5_000,
                "keep_latest": 2,
                "keep_every": 25_000,
                "restore_step": -1,
                "save_seconds": 1200.0,
            },
            # When a process counts as lost, and a run as hung: seconds without a sign of life; for
            # a step and its batch; for all else (start, compilation, pictures). 0 for no limit,
            # except to signs of life.
            "failures": {
                "lost_seconds": 90.0,
                "step_seconds": 900.0,
                "pause_seconds": 7200.0,
                "end_hung": True,
                "check_replicas": True,
            },
            "log": {
                "every_steps": 100,
                "tensorboard": False,
                "wandb": "",
                "profile_start": 0,
                "profile_steps": 0,
            },
            "sample": {
                "every_steps": 10_000,
                "num": 64,
                "batch": 64,
                "ema": "0.9999",
                "method": "euler",
                "num_points": 50,
                # The scale of classifier-free guidance, or of autoguidance where the next key
                # names the folder of a weaker denoiser: a run's, or a converted one.
                "guidance": 1.0,
                "autoguidance": "",
                "guidance_channels": 0,
                "interval": (0.0, 1.0),
                "open_interval": False,
                "seed": 0,
                "uint8": "truncate",
                "rtol": 1e-3,
                "atol": 1e-6,
                "sde_form": "sigma",
                "sde_norm": 1.0,
                "last_step": "mean",
                "last_step_size": 0.04,
            },
            # How num_samples samples are scored at the end of a run and every `every_steps`: with a
            # classifier trained on the data set named, or with the metrics of
            # python -m dsr_jax.evaluate, whose arguments the other keys are.
            "eval": {
                "classifier": "",
                "num_samples": 0,
                "split": "heldout",
                "every_steps": 0,
                "metrics": ("fid",),
                "reference": "",
                "inception": "",
                "dinov2": "",
                "batch": 64,
            },
            # What python -m dsr_jax.train_decoder trains in place of a denoiser; width 0 for none.
            "decoder": {
                "hidden_size": 0,
                "depth": 28,
                "num_heads": 16,
                "mlp_dim": 4096,
                "patch_size": 16,
                "remat": "none",
            },
            # Its losses besides L1 (spec encoder 8); a weight of 0 switches one off. Folders are
            # python -m dsr_jax.convert's; the starts are steps.
            "lpips": {"folder": "", "weight": 1.0},
            "gan": {
                "backbone": "",
                "weight": 0.75,
                "max_adaptive_weight": 1e4,
                "loss": "hinge",
                "kernel_size": 9,
                "key_depths": (2, 5, 8, 11),
                "cutout": 0.0,
                "discriminator_start": 0,
                "generator_start": 0,
            },
        },
        convert_dict=True,
    ).lock()


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
    """Plain values; tuples become lists."""
    return json.loads(json.dumps(config.to_dict()))
