"""Builds what a config of text-to-image needs besides the denoiser."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsr_jax.build.prompts import make_prompt_tokenizer
from dsr_jax.build.remat import first_policy
from dsr_jax.config import ConfigDict
from dsr_jax.convert.files import load_converted
from dsr_jax.convert.qwen2 import FAMILY, resize_vocabulary
from dsr_jax.core.errors import ConfigError, ConversionError, DataError
from dsr_jax.core.prompts import IGNORED, encode_requests
from dsr_jax.core.slots import is_answer
from dsr_jax.core.trees import flatten_names, unflatten_names
from dsr_jax.core.typing import Array, Batch, Params
from dsr_jax.data.base import Source
from dsr_jax.data.sources import make_caption_source
from dsr_jax.models.conditioning import TextCondition, drop_text
from dsr_jax.models.denoiser import Denoiser
from dsr_jax.models.language import LanguageModel
from dsr_jax.models.text_to_image import TextToImage
from dsr_jax.models.transformer import DiffusionTransformer
from dsr_jax.sampling.sampler import Conditioner
from dsr_jax.training.optimizers import Optimizer
from dsr_jax.training.state import TrainState, create_state
from dsr_jax.training.text_step import TextModel


def add_language_model(
    config: ConfigDict,
    kind: type[Denoiser],
    shared: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> TextToImage:
    """Returns the model of a config with text.

    Args:
      config: Experiment config.
      kind: Class of the denoiser.
      shared: Constructor arguments that both networks take.
      settings: The denoiser's own constructor arguments.

    Raises:
      ConfigError: If the denoiser takes no condition per token.
    """
    if not issubclass(kind, DiffusionTransformer) or kind.reversed_time:
        raise ConfigError(
            f"config.model.name={config.model.name!r} takes no text",
            "choose lightningdit or ditdh, or set config.language.hidden_size=0",
        )
    section = config.language
    width = settings["condition_width"] or settings["hidden_size"]
    language = LanguageModel(
        vocab_size=section.vocab_size,
        hidden_size=section.hidden_size,
        depth=section.depth,
        num_heads=section.num_heads,
        num_kv_heads=section.num_kv_heads,
        mlp_dim=section.mlp_dim,
        tied=section.tied,
        remat=first_policy("language.remat", section.remat),
        attention=settings["attention"],
        precision=shared["precision"],
        constrain=shared["constrain"],
    )
    return TextToImage(
        **shared,
        language=language,
        denoiser=kind(**shared, **{**settings, "condition_width": width}),
        connector=section.connector,
        understanding=section.understanding,
        text_length=section.max_length,
    )


def make_text_model(model: TextToImage) -> TextModel:
    """Returns the functions of a model that the training step and the sampler call."""

    def apply(params: Params, *args: Any, method: str) -> Any:
        return model.apply({"params": params}, *args, method=method)

    def read(params: Params, tokens: Array, targets: Array | None, latents: Array | None) -> Any:
        return apply(params, tokens, targets, latents, method="read")

    def logits(params: Params, hidden: Array) -> Array:
        return apply(params, hidden, method="logits")

    def denoise(params: Params, x: Array, t: Array, rows: Array, dropped: Array) -> Array:
        return apply(params, x, t, TextCondition(rows, dropped), method="denoise")

    return TextModel(read, logits, denoise)


def make_conditioner(model: TextToImage) -> Conditioner:
    """Returns how the sampler makes conditions from token sequences, in one pass per batch."""
    functions = make_text_model(model)

    def prepare(params: Params, tokens: Array) -> TextCondition:
        rows = functions.read(params, tokens, None, None).rows
        return TextCondition(rows, jnp.zeros(tokens.shape[:1], bool))

    return Conditioner(prepare, drop_text, is_answer)


def make_text_denoise_fn(model: TextToImage) -> Callable[..., Array]:
    """Returns the denoiser as a function `(params, x, t, condition) -> out`."""
    functions = make_text_model(model)
    return lambda params, x, t, text: functions.denoise(params, x, t, text.rows, text.dropped)


def make_text_source(config: ConfigDict, slots: int, split: str | None = None) -> Source:
    """Opens the captioned images of a config.

    Args:
      config: Experiment config.
      slots: Image slots of a token sequence, `TextToImage.num_slots`.
      split: Replaces the config's.
    """
    section, tokenizer = config.data, make_prompt_tokenizer(config.language.tokenizer)
    tokenizer.check_table(config.language.vocab_size)
    return make_caption_source(
        section.source,
        tokenizer,
        slots,
        config.language.max_length,
        image_size=section.image_size,
        fit="center_crop",
        channels=section.channels,
        root=section.root or None,
        split=split or section.split,
        on_corrupt=section.on_corrupt,
    )


def encode_prompts(config: ConfigDict, prompts: Sequence[str], slots: int) -> np.ndarray:
    """Returns the tokens [number of prompts, L] of requests, int32.

    Raises:
      PromptError: Naming the prompt that cannot be encoded.
    """
    tokenizer = make_prompt_tokenizer(config.language.tokenizer)
    tokenizer.check_table(config.language.vocab_size)
    return encode_requests(tokenizer, prompts, slots, config.language.max_length)


def check_targets(
    batches: Callable[[int], Iterator[Batch]], max_targets: int
) -> Callable[[int], Iterator[Batch]]:
    """Returns the batches, with an error where a sample has more targets than count in the loss.

    Args:
      batches: Yields host batches from a first step on.
      max_targets: config.objective.max_targets; 0 for all.
    """

    def checked(start_step: int) -> Iterator[Batch]:
        for batch in batches(start_step):
            counts = (np.asarray(batch["targets"])[:, 1:] != IGNORED).sum(axis=1)
            if 0 < max_targets < (most := int(counts.max())):
                sample = int(batch["index"][int(counts.argmax())])
                raise DataError(
                    f"sample {sample} of the run has {most} supervised tokens, but "
                    f"config.objective.max_targets={max_targets}",
                    f"set it to {most} or more, or to 0 for all positions",
                )
            yield batch

    return checked


def start_from_language(
    config: ConfigDict,
    init: Callable[[], TrainState],
    optimizer: Optimizer,
    abstract: TrainState,
) -> Callable[[], TrainState]:
    """Puts the weights of config.language.init_from into the state that a new run starts from.

    Words that the tokenizer adds, and rows beyond the converted table, start at the mean of all
    other rows, as in Scale-RAE.

    Args:
      config: Experiment config.
      init: Makes the state with random weights.
      optimizer: Optimizer, which initializes the moments.
      abstract: The state's shapes and shardings.

    Raises:
      ConversionError: If the folder holds no language model of the config's sizes, or one with
        constants that the config's does not have.
    """
    folder = config.language.init_from
    params, record = load_converted(folder)
    if record["family"] != FAMILY:
        raise ConversionError(
            f"{folder} holds a {record['family']}",
            f"name a folder that python -m dsr_jax.convert {FAMILY} wrote",
        )
    for name in ("rope_theta", "epsilon"):
        # No shape shows these, and no key of the config sets them.
        own, other = getattr(LanguageModel, name), record["model"][name]
        if other != own:
            raise ConversionError(
                f"{folder} holds a language model with {name}={other:g}; a run's has {own:g}",
                "start from Qwen2.5 or Qwen2.5-Instruct, which have the latter",
            )
    tokenizer = make_prompt_tokenizer(config.language.tokenizer)
    first_new = min(tokenizer.image_start_id, tokenizer.image_end_id)
    params = resize_vocabulary(params, config.language.vocab_size, first_new)
    found, wanted = (
        {name: tuple(leaf.shape) for name, leaf in flatten_names(tree).items()}
        for tree in (params, abstract.params["language"])
    )
    if found != wanted:
        differing = sorted(
            name for name in {**found, **wanted} if found.get(name) != wanted.get(name)
        )
        lines = [f"{n}: {found.get(n, 'absent')} -> {wanted.get(n, 'absent')}" for n in differing]
        raise ConversionError(
            f"{folder} holds a language model of other sizes (converted -> config):\n    "
            + "\n    ".join(lines[:8]),
            "set config.language to its sizes, see conversion.json",
        )
    layout = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    remake = jax.jit(
        lambda params: create_state(params, optimizer, [float(decay) for decay in abstract.ema]),
        out_shardings=layout,
    )

    def make() -> TrainState:
        likes = flatten_names(abstract.params["language"])
        placed = {
            name: jax.device_put(np.asarray(leaf, likes[name].dtype), likes[name].sharding)
            for name, leaf in flatten_names(params).items()
        }
        random = dict(init().params)
        return remake({**random, "language": unflatten_names(placed)})

    return make
