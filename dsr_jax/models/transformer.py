"""The base class of diffusion transformers: sizes, tables, registers and scanned depth.

Source: DSR lightningDiT.py and DDT.py; paper section "diffusion registers"; spec denoiser 1 to 3.
"""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from dsr_jax.core.errors import ConfigError
from dsr_jax.core.typing import Array, Params
from dsr_jax.models.attention import Rope
from dsr_jax.models.blocks import (
    KERNELS,
    Block,
    is_unrolled,
    make_norm,
    make_stack,
    mlp_width,
    modulation,
)
from dsr_jax.models.conditioning import TextCondition, TextEmbed, check_register_condition
from dsr_jax.models.denoiser import Denoiser
from dsr_jax.models.depth import Stack, TokenRows, split_into_stacks, token_rows
from dsr_jax.models.dropout import Dropout
from dsr_jax.models.embeddings import LabelEmbed, sincos_init, unpatchify
from dsr_jax.models.flops import block_macs
from dsr_jax.models.layers import Dense, add_param, zeros
from dsr_jax.models.precision import Precision
from dsr_jax.models.rope import rope_tables
from dsr_jax.models.sizes import check_heads, check_registers
from dsr_jax.models.tuning import tuning
from dsr_jax.models.unstacked import UnstackedBlocks, run_unstacked, unstack


class FinalLayer(nn.Module):
    """Modulated norm and projection to pixels, initialized to zero.

    Attributes:
      features: Outputs p*p*C per token.
      use_rmsnorm: RMSNorm with scale, else LayerNorm without.
      use_norm: False omits the norm (final_no_ln).
      precision: Dtype policy.
    """

    features: int
    use_rmsnorm: bool = True
    use_norm: bool = True
    precision: Precision = Precision()

    @nn.compact
    def __call__(self, x: Array, condition: Array) -> Array:
        """Maps tokens [B, N, D] and a condition [B(, N), D] to [B, N, p*p*C] in float32."""
        shift, scale = modulation(condition, 2, x.shape[-1], self.precision)
        if self.use_norm:
            x = make_norm(self.use_rmsnorm, "norm_final", self.precision)(x, shift, scale)
        else:
            x = x * (1 + scale) + shift
        out = Dense(
            (self.features,),
            ("embed", None),
            kernel_init=zeros,
            precision=self.precision,
            name="linear",
        )(x)
        return self.precision.to_float32("output", out)


class DiffusionTransformer(Denoiser):
    """Sizes and parts of a class-conditional diffusion transformer with optional registers.

    Registers are inserted in front of the patch tokens just before block `register_start` and take
    part in every later block like patches, but without rotary position. Because the token count
    changes there, the depth is split into two scanned stacks, `blocks_pre` and `blocks_reg`;
    without registers there is one, `blocks`. Subclasses define how tokens are made from the input
    and how the prediction is made from tokens.

    Attributes:
      hidden_size: Width D.
      depth: Number of blocks.
      num_heads: Attention heads H.
      patch_size: Side p of a patch.
      mlp_ratio: Hidden units of the feed-forward per unit of width.
      use_qknorm: Normalizes q and k.
      use_swiglu: SwiGLU, else an MLP with tanh-GELU.
      use_rope: Rotary position in every block, besides the added sine-cosine table.
      use_rmsnorm: RMSNorm with scale, else LayerNorm without.
      num_registers: Register tokens R, a square number; 0 for none.
      register_start: First block that sees the registers.
      register_gate: A learned gate per block and head, initialized to 0, scales what the registers
        contribute to attention. The paper has none: it is for registers that are added to a trained
        network, whose output is then unchanged at first (`convert.retrofit`).
      condition_width: Width Z of a text's rows, one per token, which then take the place of class
        labels (`models.conditioning.TextCondition`); 0 for class labels.
      condition_silu: Applies SiLU to time plus text, which every modulation applies again.
      register_condition: Rule for the registers' rows, see `models.conditioning.TextEmbed`.
      remat: Rematerialization in the backward pass: "none", "full" or "dots".
      attention: Attention kernel, see `models.kernels.attend`.
      unroll: Form of the depth for the compiler, see `models.blocks.make_stack`.
      kernels: Element-wise parts of a block: "xla" or "triton", see `models.blocks.Block`.
      time_features: Sines and cosines that enter the time MLP.
      stack_prefix: Put before the names of the stacks and of the registers' tables.
    """

    label_table: ClassVar[str] = "y_embedder/embedding_table/embedding"
    position_tables: ClassVar[tuple[str, ...]] = ("pos_embed",)
    time_features: ClassVar[int] = 512
    stack_prefix: ClassVar[str] = ""

    hidden_size: int
    depth: int
    num_heads: int
    patch_size: int = 1
    mlp_ratio: float = 4.0
    use_qknorm: bool = False
    use_swiglu: bool = True
    use_rope: bool = True
    use_rmsnorm: bool = True
    num_registers: int = 0
    register_start: int = 0
    register_gate: bool = False
    condition_width: int = 0
    condition_silu: bool = True
    register_condition: str = "mean"
    remat: str = "none"
    attention: str = "auto"
    unroll: str = "auto"
    kernels: str = "xla"

    def check_sizes(self) -> None:
        """Checks that sizes fit each other; the original crashes, or worse, where they do not.

        Raises:
          ConfigError: Naming the offending keys and a value that would do.
        """
        if self.input_size % self.patch_size:
            raise ConfigError(
                f"config.model.input_size={self.input_size} is not a multiple of "
                f"patch_size={self.patch_size}"
            )
        check_heads(self.hidden_size, self.num_heads, self.use_rope)
        check_registers(self.num_registers, self.register_start, self.depth)
        check_register_condition(self.register_condition)
        if self.kernels not in KERNELS:
            raise ConfigError(
                f"config.model.kernels={self.kernels!r} is unknown",
                f"choose from {', '.join(KERNELS)}",
            )
        if self.register_gate and not self.num_registers:
            raise ConfigError(
                "config.registers.gate=True, but config.registers.num=0", "set either"
            )

    def unused_sizes(self) -> set[str]:
        """Returns the fields that have no effect, or only one that parameters' shapes show."""
        # Different ratios can give the same hidden width.
        unused = {"mlp_ratio"} | (set() if self.num_registers else {"register_start"})
        if not (self.num_registers and self.condition_width):
            unused.add("register_condition")
        # Text takes the place of classes.
        return unused | ({"num_classes"} if self.condition_width else {"condition_silu"})

    def summary(self) -> str:
        """Returns depth and registers in words."""
        registers = "no registers"
        if self.num_registers:
            registers = f"{self.num_registers} registers from block {self.register_start}"
        return f"depth {self.depth}, {registers}"

    def insertions(self) -> dict[str, tuple[int, int]]:
        """Returns (first block, number of tokens) of every kind of inserted tokens."""
        return {"reg": (self.register_start, self.num_registers)} if self.num_registers else {}

    def stacks(self) -> tuple[Stack, ...]:
        """Returns the scanned stacks that the depth is split into."""
        firsts = {kind: first for kind, (first, _) in self.insertions().items()}
        return split_into_stacks(self.depth, firsts, self.stack_prefix)

    def token_rows(self) -> tuple[TokenRows, ...]:
        """Returns the rows of tokens in every scanned stack of the network, in order."""
        return token_rows(self.stacks(), self.insertions())

    def unstacked(self, params: Params) -> Params:
        """Returns the parameters with stacks split into layers, where the platform's `Tuning` does
        so; see `models.unstacked`. For evaluations without dropout."""
        if not (tuning().unstack and is_unrolled(self.unroll, self.hidden_size)):
            return params
        found, own = dict(params), self.stacks()
        for stack in (rows.stack for rows in self.token_rows()):
            shared = stack in own and not self.condition_width
            found[stack.name] = unstack(params[stack.name], self.precision, shared_condition=shared)
        return found

    def _mlp_hidden(self, width: int) -> int:
        return mlp_width(width, self.mlp_ratio, self.use_swiglu)

    def _depth_macs(self, extra_keys: int = 0) -> int:
        """Returns the multiply-accumulates of all blocks, including inserted tokens."""
        width, inserted = self.hidden_size, self.insertions()
        return sum(
            block_macs(
                self.grid**2 + sum(count for first, count in inserted.values() if i >= first),
                hidden=width,
                mlp_hidden=self._mlp_hidden(width),
                use_swiglu=self.use_swiglu,
                extra_keys=extra_keys,
                **self._modulation_macs(inserted, i),
                gated=self.num_registers if self.register_gate and i >= self.register_start else 0,
            )
            for i in range(self.depth)
        )

    def _modulation_macs(
        self, inserted: Mapping[str, tuple[int, int]], block: int
    ) -> dict[str, int]:
        """Returns number and width of the conditions of a block."""
        if not self.condition_width:
            return {}
        rows = self.grid**2 + sum(count for first, count in inserted.values() if block >= first)
        return {"conditions": rows, "condition_width": self.condition_width}

    def _condition(
        self, time: Array, labels: Array | TextCondition, use_silu: bool = False
    ) -> tuple[Array, Array | None]:
        """Returns the condition of patches and that of registers.

        Args:
          time: Embedded times [B, D], or [B, Z] for text.
          labels: Classes [B] in 0..K, or a text's condition.
          use_silu: Applies SiLU to time plus class.

        Returns:
          [B, D] and None for classes; [B, N, Z] and [B, R, Z] for text.
        """
        if self.condition_width:
            assert isinstance(labels, TextCondition)
            return TextEmbed(
                self.num_registers,
                self.register_condition,
                self.condition_silu,
                self.precision,
                name="y_embedder",
            )(time, labels)
        assert not isinstance(labels, TextCondition)
        label = LabelEmbed(self.num_classes, self.hidden_size, name="y_embedder")(labels)
        condition = self.precision.to_float32("conditioning", time + label)
        condition = jax.nn.silu(condition) if use_silu else condition
        self.sow("intermediates", "condition", (time, label, condition))
        return condition, None

    def _table(self, name: str, rows: int, width: int, init: nn.initializers.Initializer) -> Array:
        return add_param(self, name, init, (None, "tokens", "embed"), (1, rows, width))

    def _positions(self) -> Array:
        """Returns the learned table [1, N, D] of patch positions."""
        return self._table("pos_embed", self.grid**2, self.hidden_size, sincos_init(self.grid))

    def _add_registers(self, tokens: Array, prefix: str = "") -> Array:
        """Inserts registers in front of the tokens: [B, N, D] -> [B, R+N, D]."""
        num, width = self.num_registers, tokens.shape[-1]
        side = math.isqrt(num)
        learned = self._table(f"{prefix}register_tokens", num, width, nn.initializers.normal(1.0))
        # Not `+=`, which would change parameters in place if they are NumPy arrays.
        registers = learned + self._table(
            f"{prefix}register_pos_embed", num, width, sincos_init(side)
        )
        registers = self.precision.to_residual(registers)
        registers = jnp.broadcast_to(registers, (tokens.shape[0], *registers.shape[1:]))
        return jnp.concatenate([registers, tokens], axis=1)

    def _run_depth(
        self,
        tokens: Array,
        condition: Array,
        *,
        registers: Array | None = None,
        insert: Mapping[str, Callable[[Array], Array]] = MappingProxyType({}),
        dropout: Dropout | None = None,
        **block: Any,
    ) -> Array:
        """Runs all blocks; further tokens are inserted in front on the way.

        Args:
          tokens: [B, N, D].
          condition: [B, D], or [B, N, Z] with one row per token.
          registers: Rows of the registers [B, R, Z], where tokens have rows of their own.
          insert: For every kind in `insertions` but the registers, the function that puts its
            tokens in front.
          dropout: That of all blocks.
          **block: Attributes of `models.blocks.Block` beyond those of the denoiser.

        Returns:
          [B, R+N, D], with R inserted tokens.
        """
        inserters = {
            "reg": lambda tokens: self._add_registers(tokens, self.stack_prefix),
            **insert,
        }
        for rows in token_rows(self.stacks(), self.insertions()):
            stack = rows.stack
            for kind, (first, _) in self.insertions().items():
                if first == stack.first:
                    tokens = inserters[kind](tokens)
                    if kind == "reg" and registers is not None:
                        condition = jnp.concatenate([registers, condition], axis=1)
            tokens = self._run_stack(
                stack.name,
                stack.end - stack.first,
                self.num_heads,
                tokens,
                condition,
                dropout and dropout.layers(stack.first, stack.end),
                gated=self._gated(rows),
                **block,
            )
        return tokens

    def _gated(self, rows: TokenRows) -> tuple[int, int] | None:
        """Returns index of the first and number of gated registers; None without a gate."""
        return rows.registers if self.register_gate and rows.registers[1] else None

    def _run_stack(
        self,
        name: str,
        depth: int,
        num_heads: int,
        tokens: Array,
        condition: Array,
        dropout: Dropout | None = None,
        **block: Any,
    ) -> Array:
        """Runs one scanned stack; tokens in front of the grid's patches are not rotated."""
        attributes = {
            "num_heads": num_heads,
            "mlp_ratio": self.mlp_ratio,
            "use_swiglu": self.use_swiglu,
            "use_rmsnorm": self.use_rmsnorm,
            "use_qknorm": self.use_qknorm,
            "attention": self.attention,
            "kernels": self.kernels,
            "precision": self.precision,
            "constrain": self.constrain,
            **block,
        }
        rope = self._rope(tokens.shape[-1] // num_heads, tokens.shape[1] - self.grid**2)
        weights: Any = self.get_variable("params", name)
        if isinstance(weights, UnstackedBlocks):
            layer = Block(**attributes, parent=None)
            return run_unstacked(layer, weights, self.precision, tokens, condition, rope)
        stack = make_stack(
            depth,
            tokens.shape[-1],
            self.remat,
            name,
            # Condition and rope are shared by all blocks; dropout is per block.
            in_axes=(nn.broadcast, nn.broadcast, 0),
            unroll=self.unroll,
            **attributes,
        )
        return stack(tokens, condition, rope, dropout)[0]

    def _predict(
        self, tokens: Array, condition: Array, channels: int, use_norm: bool = True
    ) -> Array:
        """Maps the patches' tokens [B, N, D] to [B, h, w, channels] by the final layer."""
        out = FinalLayer(
            self.patch_size**2 * channels,
            self.use_rmsnorm,
            use_norm,
            self.precision,
            name="final_layer",
        )(tokens, condition)
        self.sow("intermediates", "final_tokens", out)
        return unpatchify(out, self.patch_size, channels)

    def _rope(self, head_dim: int, num_prefix: int) -> Rope | None:
        if not self.use_rope:
            return None
        cos, sin = rope_tables(head_dim, self.grid, num_prefix)
        return jnp.asarray(cos), jnp.asarray(sin)
