"""JiT: a diffusion transformer on pixels that predicts the image itself.

Source: JiT model_jit.py; spec denoiser 11.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp

from dsr_jax.core.errors import ConfigError
from dsr_jax.core.typing import Array
from dsr_jax.models.dropout import Dropout, make_dropout, middle_half
from dsr_jax.models.embeddings import BottleneckPatchEmbed, LabelEmbed, SinusoidalTimeEmbed
from dsr_jax.models.flops import final_layer_macs, time_macs
from dsr_jax.models.transformer import DiffusionTransformer

_SIZES = {
    "B": {"hidden_size": 768, "depth": 12, "num_heads": 12, "class_token_start": 4},
    "L": {"hidden_size": 1024, "depth": 24, "num_heads": 16, "class_token_start": 8},
    "H": {"hidden_size": 1280, "depth": 32, "num_heads": 16, "class_token_start": 10},
}

JIT: Mapping[str, Mapping[str, int]] = MappingProxyType(
    {
        f"{name}-{patch_size}": {
            **sizes,
            "patch_size": patch_size,
            "bottleneck_dim": 256 if name == "H" else 128,
            "num_class_tokens": 32,
        }
        for name, sizes in _SIZES.items()
        for patch_size in (16, 32)
    }
)
"""Sizes by name and patch size, 16 for images of 256 pixels and 32 for those of 512.

Source: spec denoiser 11.
"""


class JiT(DiffusionTransformer):
    """Diffusion transformer on large patches of pixels, with class tokens and registers.

    Patches are embedded through a bottleneck. Class tokens are inserted before one block: copies of
    the label's embedding, each plus a learned vector. Like registers they are not rotated, take
    part in every later block and are dropped before the final layer. Time runs from t = 0, noise,
    to t = 1, data. The original never trains the position table:
    `config.optim.freeze=("pos_embed",)`.

    No code of JiT with registers was released. Here they are inserted besides the class tokens, or
    alone (`num_class_tokens=0`), each at its own block; their order does not matter to attention.

    Attributes:
      bottleneck_dim: Width between pixels and tokens.
      num_class_tokens: Class tokens; 0 for none.
      class_token_start: First block that sees them.
      dropout: Fraction of values dropped in the middle half of the depth in training.
    """

    converter: ClassVar[str] = "dsr_jax.convert.jit:CONVERTER"
    reversed_time: ClassVar[bool] = True
    time_features: ClassVar[int] = 256

    use_qknorm: bool = True
    bottleneck_dim: int = 128
    num_class_tokens: int = 32
    class_token_start: int = 4
    dropout: float = 0.0

    @nn.compact
    def __call__(
        self, x: Array, t: Array, labels: Array, dropout_keys: Array | None = None
    ) -> Array:
        """Predicts the image.

        Args:
          x: Noised images [B, h, w, C].
          t: Time [B] in [0, 1], 0 = noise, 1 = data.
          labels: Classes [B] in 0..K.
          dropout_keys: One random key per sample [B] in training; None for no dropout.

        Returns:
          [B, h, w, C] in float32.
        """
        self.check_sizes()
        tokens = BottleneckPatchEmbed(
            self.bottleneck_dim,
            self.hidden_size,
            self.patch_size,
            self.precision,
            name="x_embedder",
        )(x)
        self.sow("intermediates", "x_embedder_out", tokens)
        tokens = self.precision.to_residual(tokens + self._positions())
        time = SinusoidalTimeEmbed(
            self.hidden_size, self.time_features // 2, self.precision, name="t_embedder"
        )(t)
        label = LabelEmbed(self.num_classes, self.hidden_size, name="y_embedder")(labels)
        condition = self.precision.to_float32("conditioning", time + label)
        self.sow("intermediates", "condition", (time, label, condition))

        tokens = self._run_depth(
            tokens,
            condition,
            insert={"ctx": lambda tokens: self._add_class_tokens(tokens, label)},
            dropout=self._dropout(dropout_keys),
        )
        patches = tokens[:, self.num_registers + self.num_class_tokens :]
        return self._predict(patches, condition, self.in_channels)

    def check_sizes(self) -> None:
        """Checks that sizes fit each other.

        Raises:
          ConfigError: Naming the offending keys and a value that would do.
        """
        super().check_sizes()
        if self.condition_width:
            raise ConfigError(
                f"config.model.condition_width={self.condition_width}, but jit has class tokens",
                "choose config.model.name=lightningdit or ditdh for text",
            )
        if self.bottleneck_dim < 1 or self.num_class_tokens < 0:
            raise ConfigError(
                f"config.model.bottleneck_dim={self.bottleneck_dim}, "
                f"num_class_tokens={self.num_class_tokens}",
                "JiT-B has 128 and 32; num_class_tokens=0 for none",
            )
        if self.num_class_tokens and not 0 <= self.class_token_start < self.depth:
            raise ConfigError(
                f"config.model.class_token_start={self.class_token_start} is not one of blocks "
                f"0..{self.depth - 1}",
                "JiT-B starts at block 4 of 12, JiT-H at block 10 of 32",
            )
        if not 0 <= self.dropout < 1:
            raise ConfigError(
                f"config.model.dropout={self.dropout} is not in [0, 1)",
                "use 0 for none, less than 1",
            )

    def forward_flops(self) -> int:
        """Returns the FLOPs of one evaluation on one sample: two per multiply-accumulate."""
        tokens, width, inputs = (
            self.grid**2,
            self.hidden_size,
            self.patch_size**2 * self.in_channels,
        )
        macs = self._depth_macs() + tokens * self.bottleneck_dim * (inputs + width)
        macs += final_layer_macs(tokens, width, inputs)
        return 2 * (macs + time_macs(width, self.time_features))

    def unused_sizes(self) -> set[str]:
        """Returns the fields that have no effect, or only one that parameters' shapes show."""
        unused = super().unused_sizes()
        return unused if self.num_class_tokens else unused | {"class_token_start"}

    def insertions(self) -> dict[str, tuple[int, int]]:
        """Returns (first block, number of tokens) of every kind of inserted tokens."""
        context = (self.class_token_start, self.num_class_tokens)
        return ({"ctx": context} if self.num_class_tokens else {}) | super().insertions()

    def _add_class_tokens(self, tokens: Array, label: Array) -> Array:
        """Inserts class tokens in front: [B, L, D] -> [B, num_class_tokens + L, D]."""
        vectors = self._table(
            "in_context_posemb",
            self.num_class_tokens,
            self.hidden_size,
            nn.initializers.normal(0.02),
        )
        context = self.precision.to_residual(label[:, None] + vectors)
        return jnp.concatenate([context, tokens], axis=1)

    def _dropout(self, keys: Array | None) -> Dropout | None:
        if keys is None or not self.dropout:
            return None
        return make_dropout(keys, middle_half(self.depth, self.dropout))
