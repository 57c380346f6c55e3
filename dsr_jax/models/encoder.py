"""Interface of frozen image encoders for representation autoencoders.

An encoder is a Linen module with the members of `Encoder`; `models.vit.ViT` is one. Any other class
is named by `config.space.encoder`: "random:package.module:Class" for random weights, or a folder
whose conversion.json names the class as its "family" and its constructor arguments as "model".
"""

from typing import Any, NamedTuple, Protocol

from dsr_jax.core.errors import ConfigError
from dsr_jax.core.typing import Array


class EncoderOutput(NamedTuple):
    """Patch tokens, row-major, in float32, and the class token where it is an output.

    Attributes:
      tokens: After the final norm [B, T, D]. A ViT's final norm has no scale or bias here, so each
        token has norm sqrt(D).
      pre_norm: Before the final norm [B, T, D]; the same as `tokens` if there is none.
      class_token: The class token after the final norm with its affine parameters [B, D]; None
        unless the encoder's config asks for it.
    """

    tokens: Array
    pre_norm: Array
    class_token: Array | None = None


class Encoder(Protocol):
    """A frozen encoder of images [B, H, W, 3] as H/P x W/P tokens.

    Calling it, `encoder(pixels, intervention)`, maps normalized images to an `EncoderOutput`. The
    intervention is None unless `neurons_shape` is defined. If it has the fields `precision` or
    `constrain`, they are set from the config and the mesh.
    """

    @property
    def patch_size(self) -> int:
        """Pixels P along one side of a token's patch."""
        ...

    @property
    def hidden_size(self) -> int:
        """Channels D of a token."""
        ...

    @property
    def pixel_mean(self) -> tuple[float, ...]:
        """Mean of each channel that images are normalized by, for values in [0, 1]."""
        ...

    @property
    def pixel_std(self) -> tuple[float, ...]:
        """Standard deviation of each channel that images are normalized by."""
        ...

    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        """Applies the network; Linen's `Module.apply`."""
        ...


_MEMBERS = ("patch_size", "hidden_size", "pixel_mean", "pixel_std", "apply")


def check_encoder(encoder: Any, key: str) -> None:
    """Checks that an encoder has the members of the protocol.

    Args:
      encoder: The encoder.
      key: Config key that names it, for messages.

    Raises:
      ConfigError: Naming the members that are missing.
    """
    missing = [name for name in _MEMBERS if not hasattr(encoder, name)]
    if missing:
        raise ConfigError(
            f"{key}: {type(encoder).__name__} lacks {', '.join(missing)}",
            "define what dsr_jax.models.encoder.Encoder lists",
        )


def neurons_shape(encoder: Any) -> tuple[int, int] | None:
    """Returns (blocks, hidden MLP units per block) that test-time registers act on, or None.

    Only encoders with an attribute `neurons_shape` take an intervention.
    """
    return getattr(encoder, "neurons_shape", None)


def trained_registers(encoder: Any) -> int:
    """Returns the number of registers that the encoder was trained with."""
    return getattr(encoder, "trained_registers", 0)
