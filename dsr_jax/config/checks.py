"""Checks of a config's values, and properties derived from them.

Nothing is built here: what a check needs is in the config itself.
"""

import math
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from dsr_jax.config.schema import leaves, to_json
from dsr_jax.core.errors import ConfigError
from dsr_jax.core.secrets import hide_secrets

Require = Callable[[bool, str, str], None]
"""`(condition, problem, remedy)`: raises a ConfigError if the condition is False."""

EMA_REST = 0.01
"""Fraction of the initial weights that EMA weights may still hold at the end of a run."""

_SPACE_KEYS = {"pixels": {"name"}, "vae": {"name", "vae", "scale", "shift"}}
_POSITIVE = (
    *("data.global_batch", "data.image_size", "data.channels", "data.num_classes"),
    *("train.steps", "optim.lr", "optim.accumulate", "objective.time_bins"),
    *("model.depth", "model.hidden_size", "model.num_heads", "model.patch_size"),
    *("model.decoder_depth", "model.decoder_hidden_size", "model.decoder_num_heads"),
    *("decoder.depth", "decoder.num_heads", "decoder.mlp_dim", "decoder.patch_size"),
    *("gan.kernel_size", "sample.num", "eval.batch", "log.every_steps"),
    "log.outlier_images",
    *("checkpoint.every_steps", "checkpoint.keep_latest", "checkpoint.save_seconds"),
    "failures.lost_seconds",
)
_NOT_NEGATIVE = (
    *("decoder.hidden_size", "lpips.weight", "gan.weight", "data.crop_from", "data.workers"),
    *("eval.every_steps", "eval.num_samples", "sample.every_steps", "sample.guidance_channels"),
    *("registers.num", "registers.start", "checkpoint.keep_every", "train.stop_after_steps"),
    *(
        "log.outliers",
        "log.profile_start",
        "log.profile_steps",
        "optim.warmup_steps",
        "optim.decay_end_steps",
    ),
    *("gan.discriminator_start", "gan.generator_start"),
    *("failures.step_seconds", "failures.pause_seconds"),
    *("language.hidden_size", "model.condition_width", "objective.max_targets"),
)
_TEXT_KEYS = {
    *("model.condition_width", "model.condition_silu", "registers.condition"),
    *("objective.language_weight", "objective.diffusion_weight", "objective.max_targets"),
    *("sample.prompts", "sample.text"),
}
_LANGUAGE_WITHOUT_SHAPE = {
    f"language.{key}" for key in ("remat", "tokenizer", "max_length", "init_from")
}
_DENOISER_SECTIONS = ("model", "registers", "objective")
_DECODER_SECTIONS = ("decoder", "lpips", "gan")


def architecture(config: ConfigDict) -> dict[str, Any]:
    """Returns the values that decide the network and its inputs, by dotted key."""
    denoiser = ("model", "registers", "space", "language")
    sections = ("space", "decoder") if trains_decoder(config) else denoiser
    unused = unused_keys(config)
    return {
        f"config.{key}": value
        for key, value in leaves(to_json(config))
        if key.split(".")[0] in sections and key not in unused
    }


def unused_keys(config: ConfigDict) -> set[str]:
    """Returns the keys that have no effect with the input space and the task of this config."""
    space = config.space.name
    used = _SPACE_KEYS.get(space, set(config.space) - _SPACE_KEYS["vae"] | {"name"})
    unused = {f"space.{key}" for key in config.space if key not in used}
    sections = _DENOISER_SECTIONS if trains_decoder(config) else _DECODER_SECTIONS
    unused |= {key for key, _ in leaves(config) if key.split(".")[0] in sections}
    if not has_text(config):
        unused |= _TEXT_KEYS
        unused |= {key for key, _ in leaves(config) if key.split(".")[0] == "language"}
    else:
        unused |= {"data.num_classes"} | _LANGUAGE_WITHOUT_SHAPE
    # They decide the task; a network for classes has no such key in its older checkpoints.
    return unused - {"decoder.hidden_size"}


def precision_recipe(config: ConfigDict, trained: bool = True) -> dict[str, Any]:
    """Returns the part of a recipe that says in which precision numbers were computed.

    Args:
      config: Experiment config.
      trained: Whether a trained network takes part; frozen ones have a float32 residual stream.
    """
    recipe = config.precision.to_dict()
    if not trained or recipe["residual"] == "float32":
        # Recipes of earlier versions, which must continue, do not have it.
        del recipe["residual"]
    return recipe


def has_text(config: ConfigDict) -> bool:
    """Whether text conditions the denoiser, in place of classes."""
    return config.language.hidden_size > 0 and not trains_decoder(config)


def trains_decoder(config: ConfigDict) -> bool:
    """Whether this is a config of python -m dsr_jax.train_decoder."""
    return config.decoder.hidden_size > 0


def hints(config: ConfigDict) -> list[str]:
    """Returns what will work, but hardly as the user expects."""
    found = []
    ema, steps = config.sample.ema, config.train.steps
    if ema != "none" and not config.train.init_from:
        left = float(ema) ** steps
        if left > EMA_REST:
            shorter = math.floor(1000 * EMA_REST ** (1 / steps)) / 1000
            found.append(
                f"the EMA weights of decay {ema} are longer than the run: after {steps:,} steps "
                f"{100 * left:.2g} % of the initial weights are still in them; samples are better "
                f"with config.ema.decays=({shorter},) and config.sample.ema={shorter}, or with "
                "config.sample.ema=none"
            )
    return found


def check(config: ConfigDict) -> None:
    """Checks what can be checked without building anything.

    Raises:
      ConfigError: Naming the key and a value that would do.
    """

    def require(condition: bool, problem: str, remedy: str) -> None:
        if not condition:
            raise ConfigError(problem, remedy)

    for part in (
        *(_check_numbers, _check_ema, _check_choices, _check_task, _check_secrets),
        *(_check_skipping, _check_outliers, _check_text, _check_guidance, _check_scores),
    ):
        part(config, require)


def _check_numbers(config: ConfigDict, require: Require) -> None:
    """Checks the ranges of numbers."""
    values = dict(leaves(config))
    for key in _POSITIVE:
        require(
            values[key] > 0, f"config.{key}={values[key]} is not positive", "use a value above 0"
        )
    for key in ("seed", "sample.seed"):
        require(
            0 <= values[key] < 2**32, f"config.{key}={values[key]}", "use a number in [0, 2**32)"
        )
    for key in _NOT_NEGATIVE:
        require(values[key] >= 0, f"config.{key}={values[key]}", "use 0 for none, or more")
    require(
        config.checkpoint.restore_step >= -1,
        f"config.checkpoint.restore_step={config.checkpoint.restore_step}",
        "name a step, or use -1 for the newest",
    )
    require(
        config.sample.batch == -1 or config.sample.batch > 0,
        f"config.sample.batch={config.sample.batch}",
        "use a number above 0, or -1 for as many samples as fit into memory",
    )
    interval = config.sample.interval
    require(
        len(interval) == 2 and interval[0] < interval[-1],
        f"config.sample.interval={interval}",
        "give two times as LOW,HIGH with the lower first, for example 0.0,0.9",
    )
    dropout = config.objective.label_dropout
    require(
        0 <= dropout <= 1,
        f"config.objective.label_dropout={dropout} is not a fraction",
        "use 0 to 1",
    )


def _check_ema(config: ConfigDict, require: Require) -> None:
    """Checks the decays of EMA weights, and that samples use one of them."""
    for decay in config.ema.decays:
        require(
            0 <= decay < 1,
            f"config.ema.decays holds {decay}, outside of [0, 1)",
            "use decays such as 0.9999",
        )
    ema = config.sample.ema
    known = [str(decay) for decay in config.ema.decays]
    require(
        ema in ("none", *known),
        f"config.sample.ema={ema!r} is not among config.ema.decays={config.ema.decays}",
        f"choose from {', '.join(['none', *known])}",
    )


def _check_choices(config: ConfigDict, require: Require) -> None:
    """Checks names that no function looks up when all is built."""
    require(
        config.precision.matmul in ("default", "tensorfloat32", "highest", "high", "bfloat16"),
        f"config.precision.matmul={config.precision.matmul!r} is unknown",
        "choose from default, bfloat16, tensorfloat32, high, highest",
    )
    require(
        config.eval.classifier in ("", "digits"),
        f"config.eval.classifier={config.eval.classifier!r} is unknown",
        "choose digits, or leave it empty for no classifier",
    )


def _check_task(config: ConfigDict, require: Require) -> None:
    """Checks that what a run starts from, or learns from, is of its task."""
    require(
        not config.data.latents or (config.space.name == "rae" and not trains_decoder(config)),
        f"config.data.latents={config.data.latents!r}, but images are needed",
        "latents are for training a denoiser with config.space.name=rae",
    )
    require(
        not config.train.init_from or not trains_decoder(config),
        f"config.train.init_from={config.train.init_from!r}, but a decoder is trained",
        "leave it empty: only denoisers start from a converted folder",
    )


def _check_outliers(config: ConfigDict, require: Require) -> None:
    """Checks the outlier statistics of a denoiser."""
    times = config.log.outlier_times
    require(
        bool(times) and all(0 <= time <= 1 for time in times),
        f"config.log.outlier_times={times}",
        "give noise levels from 0, data, to 1, noise, for example 0.1,0.5,0.9",
    )
    require(
        len({f"{time:.2f}" for time in times}) == len(times),
        f"config.log.outlier_times={times}: some are equal in the names of metrics, tT.TT",
        "give noise levels that differ by 0.01 or more",
    )
    require(
        not config.log.outliers or not trains_decoder(config),
        f"config.log.outliers={config.log.outliers}, but a decoder is trained",
        "set it to 0: only denoisers are measured",
    )


def _check_secrets(config: ConfigDict, require: Require) -> None:
    """Checks that no value, which is stored with every result, holds a token or password."""
    for key, value in leaves(config):
        require(
            not isinstance(value, str) or hide_secrets(value) == value,
            f"config.{key} holds a secret, and the config is stored with every result",
            "leave it to the environment or to the tool's own login",
        )


def _check_skipping(config: ConfigDict, require: Require) -> None:
    """Checks which batches a run skips."""
    require(
        config.failures.on_nonfinite in ("stop", "skip"),
        f"config.failures.on_nonfinite={config.failures.on_nonfinite!r} is unknown",
        "choose stop or skip",
    )
    steps = config.train.skip_steps
    require(
        all(type(step) is int and step > 0 for step in steps),
        f"config.train.skip_steps={steps}",
        "name steps from 1, as in --config.train.skip_steps=(1200,1201)",
    )


def _check_text(config: ConfigDict, require: Require) -> None:
    """Checks that a config of text has what training on text needs."""
    if not has_text(config):
        return
    section, rows = config.language, (config.sample.every_steps, config.sample.prompts)
    for key in ("depth", "num_heads", "num_kv_heads", "mlp_dim", "vocab_size", "max_length"):
        value = section[key]
        require(value > 0, f"config.language.{key}={value} is not positive", "use a value above 0")
    require(
        not rows[0] or bool(rows[1]),
        f"config.sample.every_steps={rows[0]}, but there is no prompt to show",
        "set config.sample.prompts=('...',), or config.sample.every_steps=0",
    )
    require(
        config.sample.text in ("forced", "greedy"),
        f"config.sample.text={config.sample.text!r} is unknown",
        "choose forced or greedy",
    )
    require(
        not (config.eval.classifier or config.eval.every_steps or config.eval.num_samples),
        "config.eval asks for scores by the training itself, which need classes",
        "set config.eval.classifier='', config.eval.every_steps=0 and config.eval.num_samples=0, "
        "and score with python -m dsr_jax.evaluate_prompts",
    )
    for key, value in (("latents", ""), ("crop_from", 0)):
        require(
            config.data[key] == value,
            f"config.data.{key}={config.data[key]!r} has no effect on captioned images",
            f"leave it at {value!r}",
        )
    require(
        not config.data.flip,
        "config.data.flip=True mirrors pictures whose captions may name left and right",
        "set config.data.flip=False",
    )


def _check_guidance(config: ConfigDict, require: Require) -> None:
    """Checks that guidance has a prediction to lead away from."""
    section, dropout = config.sample, config.objective.label_dropout
    require(
        section.guidance == 1 or bool(section.autoguidance) or dropout > 0,
        f"config.sample.guidance={section.guidance} with config.objective.label_dropout={dropout}: "
        "the null class, which classifier-free guidance leads away from, is never trained",
        "set config.sample.guidance=1.0, train with config.objective.label_dropout=0.1, or name a "
        "weaker model in config.sample.autoguidance",
    )
    require(
        not (section.autoguidance and section.guidance_channels),
        f"config.sample.guidance_channels={section.guidance_channels} with autoguidance",
        "set config.sample.guidance_channels=0: autoguidance moves all channels",
    )


def _check_scores(config: ConfigDict, require: Require) -> None:
    """Checks that what config.eval asks for can be scored."""
    section = config.eval
    networks = section.inception or section.dinov2
    require(
        bool(section.reference) == bool(networks),
        f"config.eval.reference={section.reference!r} with inception={section.inception!r} and "
        f"dinov2={section.dinov2!r}",
        "name both the reference and the folder of a feature network, or none of them",
    )
    require(
        not section.reference or section.num_samples > 0,
        f"config.eval.reference={section.reference!r} with num_samples={section.num_samples}",
        "set config.eval.num_samples, for example to 10000",
    )
    require(
        not section.every_steps
        or (section.num_samples > 0 and bool(section.classifier or networks)),
        f"config.eval.every_steps={section.every_steps}, but there is nothing to score",
        "set config.eval.num_samples, and reference and inception, or classifier",
    )
    require(
        not section.reference or not trains_decoder(config),
        f"config.eval.reference={section.reference!r}, but a decoder is trained",
        "leave it empty: python -m dsr_jax.evaluate_reconstruction scores decoders",
    )
