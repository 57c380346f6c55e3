"""Decoder-only language model of the Qwen2 family.

Source: transformers modeling_qwen2.py; spec t2i 2.3.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dsr_jax.core.errors import ConfigError
from dsr_jax.core.typing import Array
from dsr_jax.models.attention import Rope
from dsr_jax.models.blocks import make_stack
from dsr_jax.models.kernels import attend
from dsr_jax.models.layers import Dense, LinearInit, RMSNorm, add_param, linear, zeros
from dsr_jax.models.precision import Precision
from dsr_jax.models.rope import rotate_halves, sequence_rope_tables
from dsr_jax.parallel.axes import Constrain


def _preset(
    width: int, depth: int, heads: int, kv_heads: int, mlp: int, vocab: int, tied: bool
) -> Mapping[str, Any]:
    sizes = {"hidden_size": width, "depth": depth, "num_heads": heads, "num_kv_heads": kv_heads}
    return MappingProxyType(sizes | {"mlp_dim": mlp, "vocab_size": vocab, "tied": tied})


QWEN2: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "0.5B": _preset(896, 24, 14, 2, 4864, 151936, True),
        "1.5B": _preset(1536, 28, 12, 2, 8960, 151936, True),
        "3B": _preset(2048, 36, 16, 2, 11008, 151936, True),
        "7B": _preset(3584, 28, 28, 4, 18944, 152064, False),
    }
)
"""Sizes of Qwen2.5-Instruct by name. Source: the released configs; spec t2i 2.3."""

_NORMAL = nn.initializers.normal(0.02)
_INIT = LinearInit(lambda _: _NORMAL, lambda _: zeros)


class CausalAttention(nn.Module):
    """Causal self-attention with grouped queries and rotary positions.

    Attributes:
      num_heads: Heads H of the queries.
      num_kv_heads: Heads of keys and values, a divisor of H; head h reads head
        h // (H / num_kv_heads).
      kernel: See `models.kernels.attend`.
      precision: Dtype policy.
      constrain: Layout of activations.
    """

    num_heads: int
    num_kv_heads: int
    kernel: str = "auto"
    precision: Precision = Precision()
    constrain: Constrain = Constrain()

    @nn.compact
    def __call__(self, x: Array, rope: Rope) -> Array:
        """Maps [B, L, D] to [B, L, D]."""
        head_dim = x.shape[-1] // self.num_heads

        def project(name: str, heads: int, axis: str) -> Array:
            axes = ("embed", axis, "head_dim")
            shared: Any = {"linear_init": _INIT, "precision": self.precision, "name": name}
            return Dense((heads, head_dim), axes, **shared)(x)

        q = project("q", self.num_heads, "heads")
        k = project("k", self.num_kv_heads, "kv_heads")
        v = project("v", self.num_kv_heads, "kv_heads")
        q, k = (rotate_halves(self.precision.to_float32("rope", y), *rope) for y in (q, k))
        q, k, v = (self.precision.to_compute(y) for y in (q, k, v))
        q = self.constrain(q, "act_batch", "act_len", "act_heads", "act_head_dim")
        mixed = attend(q, k, v, self.kernel, constrain=self.constrain, causal=True)
        return Dense(
            x.shape[-1:],
            ("heads", "head_dim", "embed"),
            num_inputs=2,
            use_bias=False,
            linear_init=_INIT,
            precision=self.precision,
            name="o",
        )(mixed)


class GatedMlp(nn.Module):
    """`down(silu(gate(x)) * up(x))` without biases.

    Attributes:
      hidden: Hidden units M.
      precision: Dtype policy.
    """

    hidden: int
    precision: Precision = Precision()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps [..., D] to [..., D]."""
        shared: Any = {"use_bias": False, "linear_init": _INIT, "precision": self.precision}
        gate = Dense((self.hidden,), ("embed", "mlp"), **shared, name="gate")(x)
        value = Dense((self.hidden,), ("embed", "mlp"), **shared, name="up")(x)
        return Dense(x.shape[-1:], ("mlp", "embed"), **shared, name="down")(
            jax.nn.silu(gate) * value
        )


class LanguageBlock(nn.Module):
    """Attention and feed-forward layer, each after an RMSNorm and with a residual.

    Attributes:
      num_heads: Heads of the queries.
      num_kv_heads: Heads of keys and values.
      mlp_dim: Hidden units of the feed-forward layer.
      epsilon: Added to the norms' mean square.
      attention: Attention kernel.
      precision: Dtype policy.
      constrain: Layout of activations.
    """

    num_heads: int
    num_kv_heads: int
    mlp_dim: int
    epsilon: float = 1e-6
    attention: str = "auto"
    precision: Precision = Precision()
    constrain: Constrain = Constrain()

    @nn.compact
    def __call__(self, x: Array, rope: Rope) -> tuple[Array, None]:
        """Maps [B, L, D] to [B, L, D]; returned as a scan's (carry, output)."""
        shared: Any = {"precision": self.precision}
        x = self.constrain(x, "act_batch", "act_len", "act_embed")
        normed = RMSNorm(self.epsilon, **shared, name="norm1")(x)
        mixed = CausalAttention(
            self.num_heads,
            self.num_kv_heads,
            self.attention,
            constrain=self.constrain,
            **shared,
            name="attn",
        )(normed, rope)
        x = x + self.precision.to_residual(mixed)
        normed = RMSNorm(self.epsilon, **shared, name="norm2")(x)
        mixed = GatedMlp(self.mlp_dim, **shared, name="mlp")(normed)
        x = x + self.precision.to_residual(mixed)
        self.sow("intermediates", "block_out", x)
        return x, None


class TokenTable(nn.Module):
    """Table of token vectors.

    Attributes:
      rows: Vocabulary V.
      width: Width D.
    """

    rows: int
    width: int

    @nn.compact
    def __call__(self) -> Array:
        """Returns the table [V, D]."""
        axes = ("vocabulary", "embed")
        return add_param(self, "embedding", _NORMAL, axes, (self.rows, self.width))


class LanguageModel(nn.Module):
    """Qwen2: embeddings, causal blocks and final norm, with a tied or separate output table.

    Attributes:
      vocab_size: Rows V of the token table.
      hidden_size: Width D.
      depth: Blocks.
      num_heads: Heads of the queries.
      num_kv_heads: Heads of keys and values.
      mlp_dim: Hidden units of the feed-forward layers.
      tied: The logits' table is the token table.
      rope_theta: Base of the rotary frequencies.
      epsilon: Added to the norms' mean square.
      remat: Rematerialization in the backward pass, see `models.blocks.REMAT_POLICIES`.
      attention: Attention kernel, see `models.kernels.attend`.
      precision: Dtype policy.
      constrain: Layout of activations.
    """

    vocab_size: int
    hidden_size: int
    depth: int
    num_heads: int
    num_kv_heads: int
    mlp_dim: int
    tied: bool = True
    rope_theta: float = 1e6
    epsilon: float = 1e-6
    remat: str = "none"
    attention: str = "auto"
    precision: Precision = Precision()
    constrain: Constrain = Constrain()

    def setup(self) -> None:
        """Makes the parts."""
        self.embed = TokenTable(self.vocab_size, self.hidden_size)
        self.layers = make_stack(
            self.depth,
            self.hidden_size,
            self.remat,
            None,
            LanguageBlock,
            (nn.broadcast,),
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            mlp_dim=self.mlp_dim,
            epsilon=self.epsilon,
            attention=self.attention,
            precision=self.precision,
            constrain=self.constrain,
        )
        self.norm = RMSNorm(self.epsilon, precision=self.precision)
        if not self.tied:
            self.head = Dense(
                (self.vocab_size,),
                ("embed", "vocabulary"),
                use_bias=False,
                linear_init=_INIT,
                precision=self.precision,
            )

    def check_sizes(self) -> None:
        """Checks that sizes fit each other.

        Raises:
          ConfigError: Naming the offending keys and a value that would do.
        """
        heads, kv_heads = self.num_heads, self.num_kv_heads
        if self.hidden_size % (2 * heads):
            raise ConfigError(
                f"config.language.hidden_size={self.hidden_size} does not divide into "
                f"num_heads={heads} heads of an even number of channels",
                f"use a multiple of {2 * heads}",
            )
        if heads % kv_heads:
            raise ConfigError(
                f"config.language.num_heads={heads} is no multiple of num_kv_heads={kv_heads}",
                "each head of keys and values serves the same number of heads of queries",
            )

    def __call__(self, tokens: Array) -> Array:
        """Maps tokens [B, L] to logits [B, L, V]."""
        return self.logits(self.decode(self.embeddings(tokens)))

    def embeddings(self, tokens: Array) -> Array:
        """Looks up tokens [B, L] -> [B, L, D]; an id beyond the table gives NaN."""
        rows = jnp.take(self.embed(), tokens, axis=0, mode="fill", fill_value=jnp.nan)
        return self.precision.to_residual(rows)

    def decode(self, embeddings: Array) -> Array:
        """Maps embeddings [B, L, D] to hidden states [B, L, D] after the final norm.

        Each position sees itself and those before it, so that padding behind a sequence changes
        nothing in it.
        """
        head_dim = self.hidden_size // self.num_heads
        tables = sequence_rope_tables(head_dim, embeddings.shape[1], self.rope_theta)
        rope = (jnp.asarray(tables[0]), jnp.asarray(tables[1]))
        return self.norm(self.layers(embeddings, rope)[0])

    def logits(self, hidden: Array) -> Array:
        """Maps hidden states [..., D] to logits [..., V] in float32."""
        if self.tied:
            out = linear(hidden, self.embed().T, None, 1, self.precision)
        else:
            out = self.head(hidden)
        return self.precision.to_float32("output", out)

    def forward_flops(self, length: int) -> int:
        """Returns the FLOPs of hidden states of one sequence of `length` tokens, without logits."""
        width, kv_width = self.hidden_size, self.hidden_size // self.num_heads * self.num_kv_heads
        projections = 2 * width**2 + 2 * width * kv_width + 3 * width * self.mlp_dim
        return 2 * self.depth * length * (projections + 2 * length * width)
