"""LPIPS: torchvision's VGG16 and taming-transformers' linear layers as one converted folder.

Source: taming-transformers lpips.py; spec encoder 10 and 13.
"""

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dsr_jax.convert.files import check_new_folder, load_converted, save_converted, source_record
from dsr_jax.convert.readers import read_state
from dsr_jax.convert.rules import CONV, Rule, RuleSet, shapes_of, torch_to_flax
from dsr_jax.core.errors import ConversionError
from dsr_jax.core.trees import count_params
from dsr_jax.core.typing import Params
from dsr_jax.models.lpips import CONVOLUTIONS, LPIPS

FAMILY = "lpips"
"""What conversion.json calls it."""

_SLICE_STARTS = (0, 4, 9, 16, 23)
"""First layer of each slice among torchvision's `features`."""

_WHOLE = re.compile(r"net\.slice([1-5])\.(\d+)\.(weight|bias)")


def lpips_rules(channels: tuple[int, ...]) -> RuleSet:
    """Returns the rules of both files: `features.*` of VGG16 and `lin*` of the linear layers."""
    rules = [Rule(f"lin{k}.model.1.weight", f"weight{k + 1}") for k in range(len(CONVOLUTIONS))]
    for number, (first, count) in enumerate(zip(_SLICE_STARTS, CONVOLUTIONS, strict=True), start=1):
        for index in range(count):
            # Behind the first slice a pool comes first; a ReLU follows each convolution.
            source = f"features.{first + (number > 1) + 2 * index}"
            target = f"conv{number}_{index + 1}"
            rules.append(Rule(f"{source}.weight", f"{target}/kernel", CONV))
            rules.append(Rule(f"{source}.bias", f"{target}/bias"))
    images = jnp.zeros((1, 16, 16, 3))
    abstract = nn.unbox(jax.eval_shape(LPIPS(channels).init, jax.random.key(0), images, images))
    dropped = ("classifier.*", "scaling_layer.*")
    return RuleSet(tuple(rules), shapes_of(abstract["params"]), dropped)


def take_lpips(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Names the tensors of a whole LPIPS network as torchvision does; leaves others as they are."""

    def rename(name: str) -> str:
        found = _WHOLE.fullmatch(name)
        if found is None:
            return name
        first = _SLICE_STARTS[int(found[1]) - 1]
        return f"features.{first + int(found[2])}.{found[3]}"

    return {rename(name): x for name, x in state.items()}


def infer_lpips(state: Mapping[str, np.ndarray]) -> LPIPS:
    """Reads the widths off the linear layers.

    Raises:
      ConversionError: If one is missing or of odd shape.
    """
    names = [f"lin{k}.model.1.weight" for k in range(len(CONVOLUTIONS))]
    for name in names:
        if name not in state or state[name].ndim != 4:
            found = list(state[name].shape) if name in state else "absent"
            raise ConversionError(
                f"{name} is {found}", "give --source with taming-transformers' vgg.pth"
            )
    return LPIPS(tuple(state[name].shape[1] for name in names))


def read_lpips(source: str | Path, vgg: str | Path | None = None) -> tuple[LPIPS, Params]:
    """Reads the network and its parameters.

    Args:
      source: taming-transformers' `vgg.pth`, which holds the linear layers, or a file of both.
      vgg: torchvision's `vgg16-397923af.pth`; None if `source` holds both.

    Raises:
      ConversionError: If anything is missing, unknown or does not fit.
    """
    state = take_lpips(read_state(source))
    if vgg is not None:
        backbone = read_state(vgg)
        if twice := sorted(set(state) & set(backbone)):
            raise ConversionError(
                f"{source} and {vgg} both hold {', '.join(twice[:4])}", "leave --vgg out"
            )
        state |= backbone
    elif not any(name.startswith("features.") for name in state):
        raise ConversionError(
            f"{source} holds the linear layers alone, not VGG16",
            "give --vgg with torchvision's vgg16-397923af.pth",
        )
    network = infer_lpips(state)
    return network, torch_to_flax(state, lpips_rules(network.channels))


def load_lpips(folder: str | Path) -> tuple[LPIPS, Params]:
    """Reads what was converted into a folder.

    Raises:
      ConversionError: If there is nothing, or a model of another kind.
    """
    params, record = load_converted(folder)
    if record["family"] != FAMILY:
        raise ConversionError(
            f"{folder} holds a {record['family']}, not LPIPS",
            f"name a folder that python -m dsr_jax.convert {FAMILY} wrote",
        )
    return LPIPS(tuple(record["model"]["channels"])), params


def convert_lpips(args: argparse.Namespace) -> None:
    """Reads LPIPS into our format."""
    check_new_folder(args.out)
    network, params = read_lpips(args.source, args.vgg)
    record: dict[str, Any] = {"family": FAMILY, "model": {"channels": network.channels}}
    if args.vgg:
        record["vgg"] = source_record(args.vgg)
    save_converted(args.out, params, {**record, **source_record(args.source)})
    print(f"{args.source}: LPIPS with {count_params(params):,} parameters -> {args.out}")


def add_lpips_command(families: Any) -> None:
    """Adds LPIPS to the command line's families (argparse subparsers)."""
    parser = families.add_parser(FAMILY, help="perceptual distance for training a decoder")
    parser.add_argument("--source", required=True, help="taming-transformers' vgg.pth")
    parser.add_argument("--vgg", help="torchvision's vgg16-397923af.pth")
    parser.add_argument("--out", required=True, help="new folder")
    parser.set_defaults(run=convert_lpips)
