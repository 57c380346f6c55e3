"""Inception of FID: the PyTorch ports' `.pth` or TensorFlow's graph file as a converted folder.

Source: pytorch-fid, torch-fidelity and the ADM evaluator's classify_image_graph_def.pb; spec
evaluation 5.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dsr_jax.convert.files import check_new_folder, load_converted, save_converted, source_record
from dsr_jax.convert.graphdef import read_constants
from dsr_jax.convert.readers import read_state
from dsr_jax.convert.rules import CONV, LINEAR, SAME, Rule, RuleSet, shapes_of, torch_to_flax
from dsr_jax.core.errors import ConversionError
from dsr_jax.core.trees import count_params
from dsr_jax.core.typing import Params
from dsr_jax.models.inception import BLOCKS, STEM, Branches, InceptionV3, convolutions
from dsr_jax.models.inception_input import INPUT_SIZE

FAMILY = "inception"
"""What conversion.json calls it."""

PUBLISHED = "sha256:6726825d"
"""How the digest of the published `.pth` begins; the file's name contains it, too."""

WHERE = (
    "get pt_inception-2015-12-05-6726825d.pth from the release fid_weights of "
    "github.com/mseitzer/pytorch-fid (its SHA-256 begins with 6726825d), or "
    "classify_image_graph_def.pb of the ADM evaluator, and run python -m dsr_jax.convert inception "
    "--source FILE --out FOLDER"
)

_STEM_WIDTH = 32
_PARTS = {
    "torch": (
        ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"),
        ("fc.weight", "fc.bias"),
    ),
    "tensorflow": (
        (
            "conv2d_params",
            "batchnorm/gamma",
            "batchnorm/beta",
            "batchnorm/moving_mean",
            "batchnorm/moving_variance",
        ),
        ("softmax/weights", "softmax/biases"),
    ),
}
"""Names, by origin, of one convolution's tensors and of the classifier's."""
_LEAVES = ("kernel", "scale", "bias", "mean", "var")


def paths(origin: str) -> dict[str, str]:
    """Returns every convolution's path in our tree, and its scope in the original.

    Args:
      origin: "torch" or "tensorflow".
    """
    found = {}
    for number, conv in enumerate(convolutions(STEM)):
        found[conv.name] = _numbered("conv", number) if origin == "tensorflow" else conv.name
    for number, (block, branches) in enumerate(BLOCKS.items()):
        scopes = _tensorflow_scopes(branches) if origin == "tensorflow" else {}
        for branch in branches:
            for conv in convolutions(branch):
                scope = f"{_numbered('mixed', number)}/{scopes[conv.name]}" if scopes else ""
                found[f"{block}/{conv.name}"] = scope or f"{block}.{conv.name}"
    return found


def _numbered(name: str, number: int) -> str:
    """Returns a unique name, made as TensorFlow does."""
    return f"{name}_{number}" if number else name


def _tensorflow_scopes(branches: Branches) -> dict[str, str]:
    """Scopes below a block: single convolutions have scopes of their own, chains are towers."""
    scopes, towers = {}, 0
    for branch in branches:
        chain = list(convolutions(branch))
        if not chain:
            continue
        if branch == (chain[0],):
            scopes[chain[0].name] = "conv"
            continue
        tower, towers = _numbered("tower", towers), towers + 1
        single = [step for step in branch if step in chain]
        pair = [conv for conv in chain if conv not in single]
        for index, conv in enumerate(single):
            scopes[conv.name] = f"{tower}/{_numbered('conv', index)}"
        for index, conv in enumerate(pair):
            scopes[conv.name] = f"{tower}/mixed/{_numbered('conv', index)}"
    return scopes


def inception_rules(network: InceptionV3, origin: str = "torch") -> RuleSet:
    """Returns the rules for names and layouts of one origin, "torch" or "tensorflow"."""
    _, classifier = _PARTS[origin]
    rules = conv_rules(paths(origin), origin)
    rules.append(Rule(classifier[0], "fc/kernel", LINEAR if origin == "torch" else SAME))
    rules.append(Rule(classifier[1], "fc/bias"))
    images = jnp.zeros((1, INPUT_SIZE, INPUT_SIZE, 3))
    abstract = nn.unbox(jax.eval_shape(network.init, jax.random.key(0), images))
    return RuleSet(tuple(rules), shapes_of(abstract["params"]), ("*.num_batches_tracked",))


def conv_rules(scopes: Mapping[str, str], origin: str = "torch") -> list[Rule]:
    """Rules of convolutions, by path in our tree and scope in the original's."""
    parts, _ = _PARTS[origin]
    separator, kernel = (".", CONV) if origin == "torch" else ("/", SAME)
    return [
        Rule(f"{scope}{separator}{part}", f"{path}/{leaf}", kernel if leaf == "kernel" else SAME)
        for path, scope in scopes.items()
        for part, leaf in zip(parts, _LEAVES, strict=True)
    ]


def infer_inception(state: Mapping[str, np.ndarray], origin: str = "torch") -> InceptionV3:
    """Reads the widths off the first convolution and the classifier.

    Raises:
      ConversionError: If one is missing or of odd shape.
    """
    separator, axis = (".", 0) if origin == "torch" else ("/", -1)
    parts, classifier = _PARTS[origin]
    first = f"{paths(origin)['Conv2d_1a_3x3']}{separator}{parts[0]}"
    for name, rank in ((first, 4), (classifier[1], 1)):
        if name not in state or state[name].ndim != rank:
            found = list(state[name].shape) if name in state else "absent"
            raise ConversionError(f"{name} is {found}: this is not FID's Inception", WHERE)
    width, classes = state[first].shape[axis], len(state[classifier[1]])
    if _STEM_WIDTH % width:
        raise ConversionError(f"{first} has {width} channels: this is not FID's Inception", WHERE)
    return InceptionV3(_STEM_WIDTH // width, classes)


def read_inception(source: str | Path) -> tuple[InceptionV3, Params]:
    """Reads a `.pth` or `.safetensors` state dict, or TensorFlow's `.pb` graph.

    Raises:
      ConversionError: If the file is missing, damaged or of another network.
    """
    if not Path(source).exists():
        raise ConversionError(f"{source} does not exist", WHERE)
    graph = Path(source).suffix == ".pb"
    origin = "tensorflow" if graph else "torch"
    if graph:
        # The graph's scalars resize and scale its images; only arrays are weights.
        state = {name: x for name, x in read_constants(source).items() if x.ndim}
    else:
        state = read_state(source)
    network = infer_inception(state, origin)
    return network, torch_to_flax(state, inception_rules(network, origin))


def load_inception(folder: str | Path) -> tuple[InceptionV3, Params, dict[str, Any]]:
    """Reads what was converted into a folder: network, parameters, record.

    Raises:
      ConversionError: If there is nothing, or a model of another kind, saying where to get it.
    """
    if not Path(folder).is_dir():
        raise ConversionError(f"no weights of Inception in {str(folder)!r}", WHERE)
    params, record = load_converted(folder)
    if record["family"] != FAMILY:
        raise ConversionError(f"{folder} holds a {record['family']}, not Inception", WHERE)
    return network_of_record(record), params, record


def network_of_record(record: Mapping[str, Any]) -> InceptionV3:
    """Returns the network described by a converted folder's record."""
    return InceptionV3(record["model"]["width_div"], record["model"]["num_classes"])


def convert_inception(args: argparse.Namespace) -> None:
    """Reads Inception into our format."""
    check_new_folder(args.out)
    network, params = read_inception(args.source)
    record = source_record(args.source)
    # Nobody publishes a digest of the graph file; params_digest identifies its weights.
    published = str(record["source_digest"]).startswith(PUBLISHED)
    sizes = {"width_div": network.width_div, "num_classes": network.num_classes}
    save_converted(
        args.out, params, {"family": FAMILY, "model": sizes, "published": published, **record}
    )
    print(f"{args.source}: Inception with {count_params(params):,} numbers -> {args.out}")
    if not published:
        print(
            f"note: {record['source_digest']} is not the published .pth ({PUBLISHED}...); scores "
            "are comparable only with those of the same params_digest"
        )


def add_inception_command(families: Any) -> None:
    """Adds Inception to the command line's families (argparse subparsers)."""
    parser = families.add_parser(FAMILY, help="the network of FID, sFID and IS", epilog=WHERE)
    parser.add_argument("--source", required=True, help=".pth of a PyTorch port, or the .pb graph")
    parser.add_argument("--out", required=True, help="new folder")
    parser.set_defaults(run=convert_inception)
