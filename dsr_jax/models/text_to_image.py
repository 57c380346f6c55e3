"""Text-to-image model: language model, queries, connector, and a denoiser conditioned per token.

Source: Scale-RAE cambrian_qwen2.py, MetaQuery; spec t2i 2.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from dsr_jax.core.errors import ConfigError
from dsr_jax.core.prompts import IMAGE_SLOT
from dsr_jax.core.slots import first_slot, is_answer
from dsr_jax.core.typing import Array, Params
from dsr_jax.models.conditioning import TextCondition
from dsr_jax.models.denoiser import Denoiser
from dsr_jax.models.embeddings import patchify
from dsr_jax.models.language import LanguageModel
from dsr_jax.models.layers import Dense, add_param
from dsr_jax.models.precision import Precision
from dsr_jax.models.transformer import DiffusionTransformer

CONNECTORS: Mapping[str, int] = {"linear": 1, "mlp2": 2}
"""Layers of the connector by its name. Source: the released code has one, the page names two."""


class Projector(nn.Module):
    """One or two linear layers with an exact GELU in between.

    Attributes:
      width: Outputs.
      depth: Layers.
      precision: Dtype policy.
    """

    width: int
    depth: int
    precision: Precision = Precision()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps [..., D] to [..., width]."""
        for i in range(self.depth):
            x = jax.nn.gelu(x, approximate=False) if i else x
            axes = ("embed", None) if i % 2 == 0 else (None, "embed")
            x = Dense((self.width,), axes, precision=self.precision, name=f"fc{i}")(x)
        return x


class TextStates(NamedTuple):
    """What the language model makes of a batch.

    Attributes:
      hidden: Hidden states [B, L, H] after the final norm.
      rows: The connector's rows at the image slots [B, N, Z], the denoiser's condition.
      answers: Samples [B] with an image to generate; bool.
    """

    hidden: Array
    rows: Array
    answers: Array


class TextToImage(Denoiser):
    """Denoiser that a language model conditions.

    Each of the image's slots in the token sequence holds a learned query; the language model's
    hidden state there, mapped by the connector, conditions the latent token of the same raster
    position. An image that the text shows instead of asking for it (nothing before its slots is
    supervised) has its own features in the slots if `understanding` is set.

    Attributes:
      language: The language model.
      denoiser: A denoiser with `condition_width`.
      connector: A name in CONNECTORS.
      understanding: Has the projector of shown images' features.
      text_length: Tokens of a sequence; for shapes and FLOPs only.
    """

    converter: ClassVar[str] = ""

    language: LanguageModel
    denoiser: DiffusionTransformer
    connector: str = "linear"
    understanding: bool = False
    text_length: int = 512

    @property
    def grid(self) -> int:
        """Latent tokens along one side."""
        return self.denoiser.grid

    @property
    def num_slots(self) -> int:
        """Slots of an image in a token sequence: one per latent token, and per register if its
        condition is a query."""
        extra = self.denoiser.num_registers if self.denoiser.register_condition == "query" else 0
        return self.grid**2 + extra

    def setup(self) -> None:
        """Makes the parts."""
        width = self.language.hidden_size
        self.queries = add_param(
            self,
            "queries",
            nn.initializers.normal(width**-0.5),
            ("tokens", "embed"),
            (self.num_slots, width),
        )
        depth = CONNECTORS[self.connector]
        self.connect = Projector(self.denoiser.condition_width, depth, self.precision)
        if self.understanding:
            self.project = Projector(width, 2, self.precision)

    def __call__(self, x: Array, t: Array, tokens: Array) -> Array:
        """Maps noised latents [B, h, w, C], times [B] and tokens [B, L] to [B, h, w, C]."""
        states = self.read(tokens, features=x if self.understanding else None)
        if self.is_initializing():
            self.language.logits(states.hidden[:, :1])
            if self.understanding:
                self._project(x)
        kept = jnp.zeros(x.shape[:1], bool)
        return self.denoise(x, t, TextCondition(states.rows, kept))

    def unstacked(self, params: Params) -> Params:
        """Returns the parameters with those of the denoiser unstacked."""
        return {**params, "denoiser": self.denoiser.unstacked(params["denoiser"])}

    def read(
        self, tokens: Array, targets: Array | None = None, features: Array | None = None
    ) -> TextStates:
        """Runs the language model once.

        Args:
          tokens: Token ids [B, L], IMAGE_SLOT in the image's `num_slots` consecutive slots.
          targets: Targets [B, L], by which shown images are known; None if all are asked for.
          features: Latents [B, h, w, C] of shown images.
        """
        embeddings, start, answers = self._embed(tokens, targets, features)
        hidden = self.language.decode(embeddings)
        positions = start[:, None] + jnp.arange(self.num_slots)
        at_slots = jnp.take_along_axis(hidden, positions[..., None], axis=1, mode="clip")
        return TextStates(hidden, self.connect(at_slots), answers)

    def embed(
        self, tokens: Array, targets: Array | None = None, features: Array | None = None
    ) -> Array:
        """Returns the language model's input [B, L, H]; arguments as those of `read`."""
        return self._embed(tokens, targets, features)[0]

    def _embed(
        self, tokens: Array, targets: Array | None, features: Array | None
    ) -> tuple[Array, Array, Array]:
        """Returns embeddings [B, L, H], first slots [B] and which samples ask for an image [B]."""
        slots, start = tokens == IMAGE_SLOT, first_slot(tokens)
        answers = is_answer(tokens, targets)
        words = self.language.embeddings(jnp.where(slots, 0, tokens))
        index = jnp.clip(jnp.arange(tokens.shape[1]) - start[:, None], 0, self.num_slots - 1)
        filling = jnp.take(self.queries, index, axis=0)
        if features is not None and self.understanding:
            shown = self._project(features)
            index = jnp.minimum(index, shown.shape[1] - 1)
            shown = jnp.take_along_axis(shown, index[..., None], axis=1)
            filling = jnp.where(answers[:, None, None], filling, shown)
        return jnp.where(slots[..., None], filling, words), start, answers

    def _project(self, latents: Array) -> Array:
        """Maps latents [B, h, w, C] to embeddings of their tokens [B, N, H]."""
        patches = patchify(latents, self.denoiser.patch_size)
        return self.project(patches.reshape(*patches.shape[:2], -1))

    def denoise(self, x: Array, t: Array, text: TextCondition) -> Array:
        """Maps noised latents [B, h, w, C] and times [B] to a prediction [B, h, w, C]."""
        return self.denoiser(x, t, text)

    def logits(self, hidden: Array) -> Array:
        """Maps hidden states [..., H] to logits [..., V]."""
        return self.language.logits(hidden)

    def check_sizes(self) -> None:
        """Checks that sizes fit each other.

        Raises:
          ConfigError: Naming the offending keys and a value that would do.
        """
        self.language.check_sizes()
        self.denoiser.check_sizes()
        if self.connector not in CONNECTORS:
            raise ConfigError(
                f"config.language.connector={self.connector!r} is unknown",
                f"choose from {', '.join(CONNECTORS)}",
            )
        if self.num_slots >= self.text_length:
            raise ConfigError(
                f"config.language.max_length={self.text_length} does not hold a prompt beside "
                f"{self.num_slots} image slots",
                "set it to the number of slots and the longest prompt's tokens",
            )

    def forward_flops(self) -> int:
        """Returns the FLOPs of one evaluation on one sample, with the language model's hidden
        states and without its logits."""
        width, rows = self.language.hidden_size, self.denoiser.condition_width
        connector = width * rows + (CONNECTORS[self.connector] - 1) * rows**2
        return (
            self.denoiser.forward_flops()
            + self.language.forward_flops(self.text_length)
            + 2 * self.num_slots * connector
        )

    def unused_sizes(self) -> set[str]:
        """Returns the fields that have no effect, or only one that parameters' shapes show."""
        return {"text_length", "num_classes"}

    def summary(self) -> str:
        """Returns sizes in words."""
        language = self.language
        return (
            f"{self.denoiser.summary()}; language model of depth {language.depth} and width "
            f"{language.hidden_size}, {self.num_slots} queries"
        )


def initial_inputs(model: nn.Module, latent_shape: tuple[int, int, int]) -> tuple[Any, ...]:
    """Returns inputs of one sample with which a denoiser's parameters are initialized."""
    x, t = jnp.zeros((1, *latent_shape)), jnp.zeros((1,))
    if isinstance(model, TextToImage):
        slots = jnp.full((1, model.num_slots), IMAGE_SLOT, jnp.int32)
        return x, t, jnp.concatenate([jnp.zeros((1, 1), jnp.int32), slots], axis=1)
    if getattr(model, "condition_width", 0):
        raise TypeError("a denoiser of text is initialized as part of TextToImage")
    return x, t, jnp.zeros((1,), jnp.int32)
