"""The interface between images and latents."""

from typing import Protocol

from dsr_jax.core.typing import Array, PyTree


class InputSpace(Protocol):
    """Maps images to latents and back.

    Frozen networks are passed as `variables`, so that a compiled step takes them as arguments:
    captured arrays would be copied into the program as constants.
    """

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of one latent."""
        ...

    def encode(self, variables: PyTree, images: Array, keys: Array | None = None) -> Array:
        """Maps images [B, H, W, C], float in [0, 1], to latents [B, h, w, c].

        Args:
          variables: Frozen parameters and statistics of this space.
          images: The batch.
          keys: One random key per sample [B], for spaces whose encoding is random in training;
            None encodes without randomness.
        """
        ...

    def decode(self, variables: PyTree, latents: Array) -> Array:
        """Maps latents [B, h, w, c] to images [B, H, W, C].

        Pixels are in [0, 1], or slightly outside if a network made them; `to_uint8` clips them.
        """
        ...
