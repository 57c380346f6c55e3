"""SiT: the diffusion transformer on the latents of a VAE, with diffusion registers as an option.

Source: SiT models.py; spec denoiser 10.1 and 10.5.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from dsr_jax.core.typing import Array
from dsr_jax.models.dit import DIT, LightningDiT
from dsr_jax.models.embeddings import SinusoidalTimeEmbed

SIT: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        name: {
            **sizes,
            "patch_size": 2,
            "use_swiglu": False,
            "use_rope": False,
            "use_rmsnorm": False,
            "learn_sigma": True,
        }
        for name, sizes in DIT.items()
    }
)
"""Sizes and flags by name. Source: spec denoiser 10.1."""


class SiT(LightningDiT):
    """LightningDiT's network with SiT's flags and fixed sinusoids of the time.

    LayerNorm without parameters, no rotary position, a tanh-GELU feed-forward, patches of two, and
    twice the channels, the second half of which is dropped. Time runs from t = 0, noise, to t = 1,
    data. The original never trains the position table: `config.optim.freeze=("pos_embed",)`.

    No code of SiT with registers was released; they are LightningDiT's here, without the rotary
    position that SiT lacks.
    """

    converter: ClassVar[str] = "dsr_jax.convert.sit:CONVERTER"
    reversed_time: ClassVar[bool] = True
    time_features: ClassVar[int] = 256

    patch_size: int = 2
    use_swiglu: bool = False
    use_rope: bool = False
    use_rmsnorm: bool = False
    learn_sigma: bool = True

    def _embed_time(self, t: Array) -> Array:
        width = self.condition_width or self.hidden_size
        return SinusoidalTimeEmbed(
            width, self.time_features // 2, self.precision, name="t_embedder"
        )(t)
