"""Rules of the parts that denoisers share. Source: DSR lightningDiT.py and DDT.py; spec denoiser 9.

The names on the right are those of `models.transformer`, on the left the original's.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dsr_jax.convert.rules import CONV, LINEAR, Layout, Rule, linear, shapes_of, vector
from dsr_jax.core.errors import ConversionError
from dsr_jax.models.blocks import mlp_width
from dsr_jax.models.rope import rope_tables
from dsr_jax.models.transformer import DiffusionTransformer


def pair(
    source: str, target: str, weight: Layout = LINEAR, bias: Layout | None = None
) -> list[Rule]:
    """Rules of a layer's weight and bias."""
    return [
        Rule(f"{source}.weight", f"{target}/kernel", weight),
        Rule(f"{source}.bias", f"{target}/bias", bias or vector()),
    ]


def embedding_rules() -> list[Rule]:
    """Rules of what a denoiser with patches and Fourier features makes of its inputs."""
    return [
        *pair("x_embedder.proj", "x_embedder/proj", CONV),
        Rule("t_embedder.W", "t_embedder/W"),
        *condition_rules(),
    ]


def condition_rules() -> list[Rule]:
    """Rules of the layers that read the time's features, and of the labels' table."""
    return [
        *pair("t_embedder.mlp.0", "t_embedder/mlp_0"),
        *pair("t_embedder.mlp.2", "t_embedder/mlp_2"),
        Rule("y_embedder.embedding_table.weight", "y_embedder/embedding_table/embedding"),
    ]


def register_rules(prefix: str = "") -> list[Rule]:
    """Rules of one set of registers."""
    names = [f"{prefix}register_{kind}" for kind in ("tokens", "pos_embed")]
    return [Rule(name, name) for name in names]


def final_rules(width: int, has_scale: bool) -> list[Rule]:
    """Rules of the final layer; `has_scale` where its norm has a learned one."""
    source, target = "final_layer.adaLN_modulation.1", "final_layer/adaLN"
    rules = [
        *pair(source, target, linear(outputs=(2, width)), vector(2, width)),
        *pair("final_layer.linear", "final_layer/linear"),
    ]
    if has_scale:
        rules.append(Rule("final_layer.norm_final.weight", "final_layer/norm_final/scale"))
    return rules


def block_rules(
    model: DiffusionTransformer, width: int, heads: int, kv_bias: bool = False
) -> list[Rule]:
    """Rules of one block of this width, below the block's name on either side."""
    head_dim = width // heads
    rules = [
        *pair(
            "attn.qkv", "attn/qkv", linear(outputs=(3, heads, head_dim)), vector(3, heads, head_dim)
        ),
        *pair("attn.proj", "attn/proj", linear(inputs=(heads, head_dim))),
        *pair("adaLN_modulation.1", "adaLN", linear(outputs=(6, width)), vector(6, width)),
    ]
    hidden = mlp_width(width, model.mlp_ratio, model.use_swiglu)
    if model.use_swiglu:
        rules += pair("mlp.w12", "mlp/w12", linear(outputs=(2, hidden)), vector(2, hidden))
        rules += pair("mlp.w3", "mlp/w3")
    else:
        rules += [*pair("mlp.fc1", "mlp/fc1"), *pair("mlp.fc2", "mlp/fc2")]
    if model.use_rmsnorm:
        rules += [Rule(f"{name}.weight", f"{name}/scale") for name in ("norm1", "norm2")]
    if model.use_qknorm:
        for name in ("q_norm", "k_norm"):
            rules.append(Rule(f"attn.{name}.weight", f"attn/{name}/scale"))
            if not model.use_rmsnorm:
                rules.append(Rule(f"attn.{name}.bias", f"attn/{name}/bias"))
    if kv_bias:
        rules += [Rule(f"attn.{name}", f"attn/{name}") for name in ("k_bias", "v_bias")]
    return rules


def shapes_of_model(model: DiffusionTransformer) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every parameter, by Flax path."""
    x = jnp.zeros((1, model.input_size, model.input_size, model.in_channels))
    args = x, jnp.zeros(1), jnp.zeros(1, jnp.int32)
    abstract: Any = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), *args))
    return shapes_of(abstract["params"])


def register_rows(model: DiffusionTransformer, prefix: str = "") -> dict[str, int]:
    """Rope's tables in LightningDiT's state dict, with how many unrotated rows each begins."""
    names = {f"{prefix}feat_rope": 0}
    if model.num_registers:
        names[f"{prefix}feat_rope_incontext"] = model.num_registers
    return names


def rope_constants(
    model: DiffusionTransformer, width: int, heads: int, rows: Mapping[str, int]
) -> dict[str, np.ndarray]:
    """Returns rope's tables, which the original keeps in its state dict and needs to load it.

    Args:
      model: The network.
      width: Width of the blocks.
      heads: Attention heads of the blocks.
      rows: For each table how many unrotated rows it begins with.
    """
    if not model.use_rope:
        return {}
    return {
        f"{name}.freqs_{part}": table
        for name, count in rows.items()
        for part, table in zip(
            ("cos", "sin"), _official_rope_tables(width // heads, model.grid, count), strict=True
        )
    }


def _official_rope_tables(
    head_dim: int, grid: int, num_prefix: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the tables of `models.rope.rope_tables` as PyTorch computes them.

    PyTorch's power, cosine and sine round other last bits than NumPy's. Without PyTorch, NumPy's
    tables are returned, which differ by one unit in the last place.
    """
    try:
        import torch
    except ImportError:
        return rope_tables(head_dim, grid, num_prefix)
    half = head_dim // 2
    frequencies = 1.0 / 10000.0 ** (torch.arange(0, half, 2).float() / half)
    angles = (torch.arange(grid).float()[:, None] * frequencies).repeat_interleave(2, dim=-1)
    sides = angles[:, None].expand(grid, grid, half), angles[None].expand(grid, grid, half)
    table = torch.cat(sides, dim=-1).reshape(grid * grid, head_dim)
    table = torch.cat([torch.zeros(num_prefix, head_dim), table])
    return table.cos().numpy(), table.sin().numpy()


def check_keys(state: Mapping[str, np.ndarray], model: str, needed: Sequence[str]) -> None:
    """Checks that a state dict holds what a model's sizes are read off.

    Raises:
      ConversionError: Naming what it lacks, and how it begins.
    """
    absent = [key for key in needed if key not in state]
    if absent:
        raise ConversionError(
            f"this is no {model}: {', '.join(absent)} missing; it begins with "
            f"{', '.join(list(state)[:4])}",
            "name the family that the file belongs to; python -m dsr_jax.convert --help lists them",
        )


def count_blocks(state: Mapping[str, np.ndarray]) -> int:
    """Returns the number of blocks, of all widths."""
    return 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))


def infer_registers(
    state: Mapping[str, np.ndarray], tokens: str, register_start: int
) -> dict[str, Any]:
    """Returns the number of registers and their first block, as constructor arguments.

    Args:
      state: Arrays by PyTorch name.
      tokens: Name of the registers' table.
      register_start: First block with registers, which the file lacks; negative if not given.

    Raises:
      ConversionError: If there are registers and the block is not given.
    """
    if tokens not in state:
        return {"num_registers": 0, "register_start": 0}
    registers = state[tokens].shape[1]
    if register_start < 0:
        raise ConversionError(
            f"the file has {registers} registers but not the block before which they are inserted",
            "give --register-start (the paper: 8 of 28 blocks, 4 of 12)",
        )
    return {"num_registers": registers, "register_start": register_start}


def infer_heads(
    state: Mapping[str, np.ndarray], width: int, keys: Sequence[str], option: str = "--num-heads"
) -> int:
    """Heads of blocks of this width, by the first of `keys` whose last axis is one head's.

    Raises:
      ConversionError: If the file holds none of them, naming the option that gives it.
    """
    for key in keys:
        if key in state:
            return width // state[key].shape[-1]
    raise ConversionError("the number of heads cannot be read off the file", f"give {option}")


def infer_ratio(width: int, hidden: int, swiglu: bool) -> float:
    """Returns a ratio that gives `hidden` units, preferably a multiple of a half or a quarter.

    Raises:
      ConversionError: If none does.
    """
    for quarters in range(1, 65):
        ratio = quarters / 4
        if mlp_width(width, ratio, swiglu) == hidden:
            return ratio
    raise ConversionError(f"{hidden} hidden units fit no simple mlp_ratio of width {width}")
