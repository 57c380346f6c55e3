"""Names of an AutoencoderKL's tensors: diffusers' of today and before 0.18, latent-diffusion's.

Source: diffusers autoencoder_kl.py and latent-diffusion model.py (whose names VA-VAE, MAR's KL-16
and the ae.safetensors of Flux have, too); spec denoiser 9.5.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from dsr_jax.core.errors import ConversionError

_FIRST_STAGE = "first_stage_model."
"""What whole checkpoints of latent-diffusion put before the autoencoder's names."""

_OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
"""Names of attention's layers in files of diffusers before 0.18."""

_LDM_PARTS = (
    (r"mid\.block_1\.", "mid_block.resnets.0."),
    (r"mid\.block_2\.", "mid_block.resnets.1."),
    (r"mid\.attn_1\.", "mid_block.attentions.0."),
    (r"(down|up)\.(\d+)\.block\.(\d+)\.", r"\1_blocks.\2.resnets.\3."),
    (r"(down|up)\.(\d+)\.attn\.(\d+)\.", r"\1_blocks.\2.attentions.\3."),
    (r"(down|up)\.(\d+)\.(down|up)sample\.conv\.", r"\1_blocks.\2.\3samplers.0.conv."),
    (r"nin_shortcut\.", "conv_shortcut."),
    (r"(?<=coder\.)norm_out\.", "conv_norm_out."),
    (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
)
"""latent-diffusion's parts of names and diffusers', applied one after the other."""

_LDM_BACK = (
    (r"mid_block\.resnets\.0\.", "mid.block_1."),
    (r"mid_block\.resnets\.1\.", "mid.block_2."),
    (r"mid_block\.attentions\.0\.", "mid.attn_1."),
    (r"group_norm\.", "norm."),
    (r"to_([qkv])\.", r"\1."),
    (r"to_out\.0\.", "proj_out."),
    (r"conv_norm_out\.", "norm_out."),
    (r"conv_shortcut\.", "nin_shortcut."),
    (r"(down|up)_blocks\.(\d+)\.resnets\.(\d+)\.", r"\1.\2.block.\3."),
    (r"(down|up)_blocks\.(\d+)\.attentions\.(\d+)\.", r"\1.\2.attn.\3."),
    (r"(down|up)_blocks\.(\d+)\.(down|up)samplers\.0\.conv\.", r"\1.\2.\3sample.conv."),
)

_ATTENTION = re.compile(r"(.*\.attentions\.\d+)\.(.+)\.(weight|bias)")


@dataclass(frozen=True)
class NameStyle:
    """Names and shapes of tensors in a file.

    Attributes:
      old_names: Attention's layers are query, key, value and proj_attn.
      convolutions: Attention's weights are [C, C, 1, 1].
      ldm: All names are latent-diffusion's.
    """

    old_names: bool = False
    convolutions: bool = False
    ldm: bool = False


def modernize(state: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], NameStyle]:
    """Returns the autoencoder under diffusers' names and shapes of today, and the file's style.

    Raises:
      ConversionError: If a tensor is there under two names.
    """
    if any(name.startswith(_FIRST_STAGE) for name in state):
        state = {
            name.removeprefix(_FIRST_STAGE): x
            for name, x in state.items()
            if name.startswith(_FIRST_STAGE)
        }
    ldm = "encoder.down.0.block.0.conv1.weight" in state
    today = {old: new for new, old in _OLD_NAMES.items()}
    found: dict[str, np.ndarray] = {}
    old_names = convolutions = False
    for full_name, value in state.items():
        name = _flip_levels(_replace(full_name, _LDM_PARTS), state) if ldm else full_name
        if match := _ATTENTION.fullmatch(name):
            block, layer, kind = match.groups()
            if layer in today:
                name, old_names = f"{block}.{today[layer]}.{kind}", True
            if value.ndim == 4 and value.shape[2:] == (1, 1):
                value, convolutions = value[..., 0, 0], True
        if name in found:
            raise ConversionError(
                f"the file holds {name} under two names", "save the autoencoder alone, once"
            )
        found[name] = value
    return found, NameStyle(old_names, convolutions, ldm)


def restyle(state: Mapping[str, np.ndarray], style: NameStyle) -> dict[str, np.ndarray]:
    """Returns the state under a style's names and shapes: the inverse of `modernize`."""
    styled = {}
    for full_name, value in state.items():
        name = full_name
        if match := _ATTENTION.fullmatch(name):
            block, layer, kind = match.groups()
            if layer in _OLD_NAMES:
                if style.old_names:
                    name = f"{block}.{_OLD_NAMES[layer]}.{kind}"
                if style.convolutions and kind == "weight":
                    value = value[..., None, None]
        if style.ldm:
            name = _replace(_flip_levels(name, state), _LDM_BACK)
        styled[name] = value
    return styled


def _replace(name: str, parts: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in parts:
        name = re.sub(pattern, replacement, name)
    return name


def _flip_levels(name: str, state: Mapping[str, np.ndarray]) -> str:
    """Numbers a level of the decoder from its other end; latent-diffusion's 0 is the last."""

    def flip(match: re.Match[str]) -> str:
        return f"{match[1]}{last - int(match[2])}."

    last = max(
        (int(m[1]) for m in map(re.compile(r"decoder\.up(?:_blocks)?\.(\d+)\.").match, state) if m),
        default=0,
    )
    return re.sub(r"^(decoder\.up_blocks\.)(\d+)\.", flip, name)
