"""One Vision Transformer for every frozen encoder: SigLIP2, DINOv2, DINOv3 and MAE.

Source: DSR and RAE stage1/encoders, transformers' modeling files; spec encoder 4 and 5.
"""

import flax.linen as nn
import jax.numpy as jnp

from dsr_jax.core.errors import ConfigError
from dsr_jax.core.typing import Array
from dsr_jax.models.attention import Rope
from dsr_jax.models.blocks import make_stack
from dsr_jax.models.embeddings import patchify
from dsr_jax.models.encoder import EncoderOutput as EncoderOutput
from dsr_jax.models.intervention import Intervention
from dsr_jax.models.kernels import attend
from dsr_jax.models.layers import (
    Dense,
    LayerNorm,
    add_param,
    ones,
)
from dsr_jax.models.precision import Precision
from dsr_jax.models.resample import resample
from dsr_jax.models.rope import centered_rope_tables, rotate_halves
from dsr_jax.models.vit_config import ACTIVATIONS
from dsr_jax.models.vit_config import ViTConfig as ViTConfig
from dsr_jax.parallel.axes import Constrain


def resample_positions(config: ViTConfig, table: Array, rows: int, columns: int) -> Array:
    """Resamples a position table to another grid; the class token's row is unchanged.

    Args:
      config: Config of the encoder.
      table: [1, T, D], or [1, 1+T, D] with a class token, of the config's image size.
      rows: Patches from top to bottom.
      columns: Patches from left to right.

    Returns:
      [1, rows * columns, D], or one row more with a class token.
    """
    native = config.image_size // config.patch_size
    front, width = int(config.use_cls), table.shape[-1]
    grid = table[:, front:].reshape(native, native, width)
    grid = resample(grid, rows, columns, config.position_resampling)
    return jnp.concatenate([table[:, :front], grid.reshape(1, rows * columns, width)], axis=1)


class ViTBlock(nn.Module):
    """A pre-norm block: attention and MLP, each added to the stream."""

    config: ViTConfig
    attention: str
    precision: Precision
    constrain: Constrain

    @nn.compact
    def __call__(
        self, x: Array, intervention: Intervention | None, rope: Rope | None
    ) -> tuple[Array, None]:
        """Maps tokens [B, S, D] to [B, S, D]; returned as a scan's (carry, output)."""
        x = self.constrain(x, "act_batch", "act_len", "act_embed")
        attn = ViTAttention(
            self.config, self.attention, self.precision, self.constrain, name="attn"
        )
        x = x + self._branch(1, attn(self._norm("norm1")(x), rope))
        mlp = ViTMlp(self.config, self.precision, name="mlp")
        x = x + self._branch(2, mlp(self._norm("norm2")(x), intervention))
        self.sow("intermediates", "block_out", x)
        return x, None

    def _norm(self, name: str) -> nn.Module:
        epsilon = self.config.layer_norm_eps
        return LayerNorm(epsilon, affine=True, precision=self.precision, name=name)

    def _branch(self, number: int, y: Array) -> Array:
        y = self.precision.to_residual(y)
        if not self.config.use_layer_scale:
            return y
        return y * add_param(self, f"ls{number}", ones, ("embed",), y.shape[-1:])


class ViTAttention(nn.Module):
    """Full self-attention, optionally with rotary position."""

    config: ViTConfig
    attention: str
    precision: Precision
    constrain: Constrain

    @nn.compact
    def __call__(self, x: Array, rope: Rope | None) -> Array:
        """Maps [B, S, D] to [B, S, D]."""
        config = self.config
        heads = (config.num_heads, config.hidden_size // config.num_heads)

        def project(name: str, use_bias: bool) -> Array:
            axes = ("embed", "heads", "head_dim")
            return Dense(
                heads,
                axes,
                use_bias=use_bias,
                linear_init=config.linear_init,
                precision=self.precision,
                name=name,
            )(x)

        biases = {"q": config.query_bias, "k": config.key_bias, "v": config.value_bias}
        q, k, v = (project(name, use_bias) for name, use_bias in biases.items())
        if rope is not None:
            q, k = (rotate_halves(self.precision.to_float32("rope", y), *rope) for y in (q, k))
        names = ("act_batch", "act_len", "act_heads", "act_head_dim")
        q, k, v = (self.constrain(self.precision.to_compute(y), *names) for y in (q, k, v))
        self.sow("intermediates", "qk", (q, k))
        return Dense(
            x.shape[-1:],
            ("heads", "head_dim", "embed"),
            num_inputs=2,
            linear_init=config.linear_init,
            precision=self.precision,
            name="out",
        )(attend(q, k, v, self.attention, constrain=self.constrain))


class ViTMlp(nn.Module):
    """The MLP, to whose hidden units the intervention applies."""

    config: ViTConfig
    precision: Precision

    @nn.compact
    def __call__(self, x: Array, intervention: Intervention | None) -> Array:
        """Maps [B, S, D] to [B, S, D]."""
        activate = ACTIVATIONS[self.config.activation]
        hidden = self._into("fc1")(x)
        if self.config.gated_mlp:
            hidden = activate(self._into("gate")(x)) * hidden
        else:
            hidden = activate(hidden)
        if intervention is not None:
            self.sow("intermediates", "mlp_act_before", hidden)
            hidden = intervention(hidden)
        self.sow("intermediates", "mlp_act", hidden)
        return self._project("fc2", x.shape[-1], ("mlp", "embed"))(hidden)

    def _into(self, name: str) -> nn.Module:
        return self._project(name, self.config.mlp_dim, ("embed", "mlp"))

    def _project(self, name: str, features: int, axes: tuple[str, str]) -> nn.Module:
        init = self.config.linear_init
        return Dense((features,), axes, linear_init=init, precision=self.precision, name=name)


def make_vit_stack(
    config: ViTConfig,
    attention: str,
    precision: Precision,
    constrain: Constrain,
    remat: str = "none",
    unroll: str = "auto",
) -> nn.Module:
    """Returns the stack `blocks`: `(tokens, intervention, rope) -> (tokens, None)`.

    Args:
      config: Sizes and flags.
      attention: Attention kernel.
      precision: Dtype policy.
      constrain: Layout of activations.
      remat: Rematerialization in the backward pass: "none", "full" or "dots".
      unroll: Form of the depth for the compiler: "auto", "none" or "full".
    """
    return make_stack(
        config.depth,
        config.hidden_size,
        remat,
        "blocks",
        ViTBlock,
        (0, nn.broadcast),
        unroll,
        config=config,
        attention=attention,
        precision=precision,
        constrain=constrain,
    )


class ViT(nn.Module):
    """A frozen image encoder; its blocks have stacked parameters.

    With `mutable=["intermediates"]` it sows "embeddings" [B, S, D], and by block, stacked,
    "block_out" [L, B, S, D], "attn/qk", queries and keys [L, B, S, H, K], and "mlp/mlp_act"
    [L, B, S, M] (with an intervention also "mlp/mlp_act_before"). Rows S are class token, trained
    registers, patches, test-time registers.

    Attributes:
      config: Sizes and flags.
      attention: Attention kernel, see `models.kernels.attend`.
      precision: Dtype policy.
      constrain: Layout of activations.
      unroll: Form of the depth for the compiler, see `models.blocks.make_stack`.
    """

    config: ViTConfig
    attention: str = "auto"
    precision: Precision = Precision()
    constrain: Constrain = Constrain()
    unroll: str = "auto"

    @property
    def patch_size(self) -> int:
        """Pixels along one side of a patch."""
        return self.config.patch_size

    @property
    def hidden_size(self) -> int:
        """Channels of a token."""
        return self.config.hidden_size

    @property
    def pixel_mean(self) -> tuple[float, ...]:
        """Mean of each channel that images are normalized by."""
        return self.config.pixel_mean

    @property
    def pixel_std(self) -> tuple[float, ...]:
        """Standard deviation of each channel that images are normalized by."""
        return self.config.pixel_std

    @property
    def neurons_shape(self) -> tuple[int, int]:
        """Blocks, and hidden MLP units per block, that test-time registers act on."""
        return self.config.depth, self.config.mlp_dim

    @property
    def trained_registers(self) -> int:
        """Registers that the encoder was trained with."""
        return self.config.num_registers

    @nn.compact
    def __call__(self, pixels: Array, intervention: Intervention | None = None) -> EncoderOutput:
        """Encodes images.

        Args:
          pixels: [B, H, W, 3], normalized by the config's mean and standard deviation. For other
            sizes than the position table's, the table is resampled.
          intervention: Test-time registers, with a mask [L, M].

        Raises:
          ConfigError: If the image does not divide into patches, or the mask has the wrong shape.
        """
        config = self.config
        self._check(pixels, intervention)
        rows, columns = (side // config.patch_size for side in pixels.shape[1:3])
        tokens = self._embed(pixels, rows, columns)
        if intervention is not None:
            tokens = intervention.append_registers(tokens)
        self.sow("intermediates", "embeddings", tokens)
        blocks = make_vit_stack(
            config, self.attention, self.precision, self.constrain, unroll=self.unroll
        )
        tokens, _ = blocks(tokens, intervention, self._rope(rows, columns, tokens.shape[1]))
        patches = tokens[:, config.num_prefix : config.num_prefix + rows * columns]
        class_token = None
        if config.class_output:
            norm = LayerNorm(config.layer_norm_eps, affine=True, name="norm")
            class_token = norm(tokens[:, 0])
        return EncoderOutput(LayerNorm(config.layer_norm_eps)(patches), patches, class_token)

    def _check(self, pixels: Array, intervention: Intervention | None) -> None:
        config = self.config
        if pixels.ndim != 4 or pixels.shape[-1] != 3:
            raise ConfigError(
                f"images of shape {pixels.shape} are not RGB",
                "pass normalized images [B, H, W, 3]",
            )
        if any(side % config.patch_size for side in pixels.shape[1:3]):
            raise ConfigError(
                f"images of {pixels.shape[1]} x {pixels.shape[2]} pixels do not divide into "
                f"patches of {config.patch_size}",
                f"resize them, for example to {16 * config.patch_size}",
            )
        wanted = (config.depth, config.mlp_dim)
        if intervention is not None and intervention.mask.shape != wanted:
            raise ConfigError(
                f"register neurons for {intervention.mask.shape} blocks and units, but the encoder "
                f"has {wanted}",
                "use the neurons that were found for this very encoder",
            )

    def _embed(self, pixels: Array, rows: int, columns: int) -> Array:
        """Returns prefix tokens and patches with their positions [B, S, D], float32."""
        config = self.config
        width = config.hidden_size
        patches = Dense(
            (width,),
            ("patch", "patch", "channels", "embed"),
            num_inputs=3,
            precision=self.precision,
            name="patch_embed",
        )(patchify(pixels, config.patch_size))
        patches = self.precision.to_residual(patches)
        prefix = [self._token("cls_token", 1)] if config.use_cls else []
        if config.position_resampling:
            native = config.image_size // config.patch_size
            table = self._token("pos_embed", config.use_cls + native**2)
            table = resample_positions(config, table, rows, columns)
            if config.use_cls:
                prefix = [prefix[0] + table[:, :1]]
            patches = patches + table[:, config.use_cls :]
        if config.num_registers:
            prefix.append(self._token("register_tokens", config.num_registers))
        batch = patches.shape[0]
        front = [jnp.broadcast_to(token, (batch, *token.shape[1:])) for token in prefix]
        return jnp.concatenate([*front, patches], axis=1)

    def _token(self, name: str, rows: int) -> Array:
        shape = (1, rows, self.config.hidden_size)
        init = nn.initializers.normal(0.02)
        return add_param(self, name, init, (None, "tokens", "embed"), shape)

    def _rope(self, rows: int, columns: int, length: int) -> Rope | None:
        """Returns rotary tables [S, K], with the identity for all tokens but the patches."""
        config = self.config
        if not config.rope_theta:
            return None
        head_dim = config.hidden_size // config.num_heads
        cos, sin = centered_rope_tables(head_dim, rows, columns, config.rope_theta)
        around = ((config.num_prefix, length - config.num_prefix - rows * columns), (0, 0))
        return jnp.pad(cos, around, constant_values=1.0), jnp.pad(sin, around)
