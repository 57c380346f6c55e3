"""The base class of denoisers, which training, sampling and planning use."""

from typing import ClassVar

import flax.linen as nn

from dsr_jax.core.typing import Params
from dsr_jax.models.precision import Precision
from dsr_jax.parallel.axes import Constrain


class Denoiser(nn.Module, kw_only=True):
    """A class-conditional network that training, sampling and planning can use.

    A subclass defines `__call__(x, t, labels)`, which maps a noised input [B, h, w, C], times [B]
    in [0, 1] and labels [B] in 0..K to a prediction [B, h, w, C] in float32, and `forward_flops`.
    Its fields are its config keys (see `models.registry`), so each needs a default, unless
    `config/schema.py` has the key in its section `model`.

    Attributes:
      input_size: Side of the square input.
      in_channels: Channels C of the input.
      num_classes: Classes K; label K means "no class".
      precision: Dtype policy.
      constrain: Layout of activations.
      reversed_time: Time runs from t = 0, noise, to t = 1, data. `build` translates it to this
        package's convention, t = 0 for data (`diffusion.paths.flip_time`).
      converter: Location of the conversion from and to PyTorch, "package.module:NAME" of a
        `convert.converter.DenoiserConverter`; empty if there is none.
      label_table: Name of the parameter [K + 1, D] whose last row is the null label's; empty if
        there is none.
      position_tables: Names of parameters [1, N, D] with a row for each patch of a square grid.
    """

    reversed_time: ClassVar[bool] = False
    converter: ClassVar[str] = ""
    label_table: ClassVar[str] = ""
    position_tables: ClassVar[tuple[str, ...]] = ()

    input_size: int
    in_channels: int
    num_classes: int
    precision: Precision = Precision()
    constrain: Constrain = Constrain()

    @property
    def grid(self) -> int:
        """Patches along one side; pixels for networks without patches."""
        return self.input_size // getattr(self, "patch_size", 1)

    def check_sizes(self) -> None:
        """Checks that sizes fit each other.

        Raises:
          ConfigError: Naming the offending keys and a value that would do.
        """

    def forward_flops(self) -> int:
        """Returns the FLOPs of one evaluation on one sample: two per multiply-accumulate of all
        matmuls and convolutions."""
        raise NotImplementedError(f"{type(self).__name__} defines no forward_flops")

    def unstacked(self, params: Params) -> Params:
        """Returns parameters that give the same results, and that a sampler, which evaluates the
        network many times with them, reads faster."""
        return params

    def unused_sizes(self) -> set[str]:
        """Returns the fields that have no effect, or only one that parameters' shapes show."""
        return set()

    def summary(self) -> str:
        """Returns a few words on the network's size, for the log."""
        return ""
