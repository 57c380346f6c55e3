"""Golden cases of Inception: input, blocks, whole network, and the ADM evaluator's numbers."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from dsr_jax.convert.inception import conv_rules, inception_rules, infer_inception
from dsr_jax.convert.rules import RuleSet, shapes_of, torch_to_flax
from dsr_jax.core.typing import Params
from dsr_jax.evaluation.frechet import frechet_distance, gaussian_moments
from dsr_jax.evaluation.inception_score import InceptionScore
from dsr_jax.evaluation.precision_recall import precision_recall
from dsr_jax.models.inception import (
    Block,
    Branches,
    Conv,
    ConvBN,
    Features,
    InceptionV3,
    block_a,
    block_b,
    block_c,
    block_d,
    block_e,
    convolutions,
)
from dsr_jax.models.inception_input import prepare, resize_bilinear
from tools.golden.compare import Case, Check


def _below(io: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {key.removeprefix(prefix): x for key, x in io.items() if key.startswith(prefix)}


def run_resize(case: Case) -> list[Check]:
    """Compares resized images, the network's input, and how far two other conventions differ."""
    io, checks = case.io, []
    rows, columns = io["rows"], io["cols"]
    for name in case.config["cases"]:
        images = io[f"{name}/image_u8"][None]
        resized = np.asarray(resize_bilinear(images))[0]
        places = np.ix_(rows, columns)
        given, other = (np.asarray(prepare(images, mode))[0] for mode in ("adm", "pytorch_fid"))
        checks += [
            Check(f"{name}/resized", resized[places], io[f"{name}/tf1_resized_sub"], "resized"),
            Check(
                f"{name}/input", given[places], io[f"{name}/tf1_inception_input_sub"], "net_input"
            ),
            Check(
                f"{name}/pytorch_fid",
                other[places],
                io[f"{name}/neg_pytorchfid_input_sub"],
                "net_input",
            ),
        ]
        wide = resized.astype(np.float64)
        for key, moment in (("mean_c", wide), ("meansq_c", wide**2)):
            want = io[f"{name}/tf1_resized_{key}"]
            checks.append(Check(f"{name}/{key}", moment.mean(axis=(0, 1)), want, "resized_moment"))
    return checks


_ORIGINAL_BLOCKS = {
    "InceptionA": lambda state: block_a(len(state["branch_pool.bn.bias"])),
    "InceptionB": lambda state: block_b(),
    "InceptionC": lambda state: block_c(len(state["branch7x7_1.bn.bias"])),
    "InceptionD": lambda state: block_d(),
    "InceptionE_1": lambda state: block_e("avg"),
    "InceptionE_2": lambda state: block_e("max"),
}


def _with_widths(branches: Branches, state: Mapping[str, np.ndarray]) -> Branches:
    """Returns the table of a block with the channel counts of a case's weights."""

    def resize(step: Any) -> Any:
        if isinstance(step, tuple):
            return tuple(resize(conv) for conv in step)
        if not isinstance(step, Conv):
            return step
        width = len(state[f"{step.name}.bn.bias"])
        return Conv(step.name, width, step.kernel, step.stride, step.padding)

    return tuple(tuple(resize(step) for step in branch) for branch in branches)


def _single_conv(state: Mapping[str, np.ndarray], x: np.ndarray, out: np.ndarray) -> ConvBN:
    """Returns a single convolution, with stride and padding inferred from the maps' sizes."""
    features, _, *kernel = state["conv.weight"].shape
    same = x.shape[1:3] == out.shape[1:3]
    stride = 1 if same else round((x.shape[1] - kernel[0]) / max(out.shape[1] - 1, 1))
    conv = Conv("conv", features, (kernel[0], kernel[1]), stride, "SAME" if same else "VALID")
    return ConvBN(conv, features)


def run_blocks(case: Case) -> list[Check]:
    """Compares the output of each block."""
    checks = []
    for name in case.config["blocks"]:
        state = _below(case.io, f"{name}/params/")
        x, want = (case.io[f"{name}/{key}"] for key in ("in", "out"))
        if name in _ORIGINAL_BLOCKS:
            branches = _with_widths(_ORIGINAL_BLOCKS[name](state), state)
            module: nn.Module = Block(branches)
            scopes = {c.name: c.name for branch in branches for c in convolutions(branch)}
            rules = conv_rules(scopes)
        else:
            module = _single_conv(state, x, want)
            rules = [
                type(rule)(
                    rule.source.removeprefix("."), rule.target.removeprefix("/"), rule.layout
                )
                for rule in conv_rules({"": ""})
            ]
        abstract = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), x))
        rule_set = RuleSet(tuple(rules), shapes_of(abstract["params"]), ("*.num_batches_tracked",))
        params = torch_to_flax(state, rule_set)
        found: Any = jax.jit(module.apply)({"params": params}, x)
        found = found[0] if isinstance(found, tuple) else found
        checks.append(Check(name, found, want, "inception"))
    return checks


def load_network(case: Case) -> tuple[InceptionV3, Params]:
    """Returns a case's network and its parameters."""
    state = _below(case.io, "params/")
    network = infer_inception(state)
    return network, torch_to_flax(state, inception_rules(network))


def extract(network: InceptionV3, params: Params, images: np.ndarray) -> Features:
    """Returns features of uint8 images [N, H, W, 3] as NumPy arrays, in batches of 50."""
    apply: Any = jax.jit(lambda x: network.apply({"params": params}, prepare(x)))
    parts = [apply(images[first : first + 50]) for first in range(0, len(images), 50)]
    return jax.tree.map(lambda *rows: np.concatenate(rows), *parts)


def _map_of(captured: Any) -> Any:
    """Returns a layer's captured output: pools sow it, blocks have their first branch after it."""
    if isinstance(captured, tuple):
        return captured[0]
    returned = captured["__call__"][0]
    return returned[0] if isinstance(returned, tuple) else returned


def run_network(case: Case) -> list[Check]:
    """Compares means and a grid of values of every layer's map, and all features."""
    network, params = load_network(case)
    given, io = prepare(case.io["images_u8"]), case.io
    apply: Any = jax.jit(
        lambda x: network.apply(
            {"params": params}, x, capture_intermediates=True, mutable="intermediates"
        )
    )
    features, sown = apply(given)
    taps = {
        name: np.asarray(_map_of(tap))
        for name, tap in sown["intermediates"].items()
        if name not in ("__call__", "fc")
    }
    bias = np.asarray(params["fc"]["bias"])
    found: dict[str, np.ndarray] = {
        "out/pool_64": taps["MaxPool_1"].mean(axis=(1, 2)),
        "out/pool_192": taps["MaxPool_2"].mean(axis=(1, 2)),
        "out/pool_768": taps["Mixed_6e"].mean(axis=(1, 2)),
        "out/pool_2048": features.pool,
        "out/spatial_2023": features.spatial,
        "out64/pool_2048": features.pool,
    }
    for name, tap in taps.items():
        found[f"tap_mean_hw/{name}"] = tap.mean(axis=(1, 2))
        rows, columns = ((0, size // 2, size - 1) for size in tap.shape[1:3])
        found[f"tap_grid3/{name}"] = tap[:2][:, rows][:, :, columns]
    checks = [Check(key, x, io[key], "inception_tap") for key, x in found.items() if key in io]
    logits = {
        "out/logits_unbiased": features.logits,
        "out64/logits_unbiased": features.logits,
        "out/logits": features.logits + bias,
    }
    checks += [Check(key, x, io[key], "inception_logits") for key, x in logits.items()]
    for key in ("out/pool_2048", "out/spatial_2023"):
        error = np.linalg.norm(found[key] - io[key]) / np.linalg.norm(io[key])
        checks.append(Check(f"{key} (norm)", error, 0.0, "inception_norm"))
    return checks


def _fid(x: np.ndarray, y: np.ndarray) -> float:
    ours, theirs = gaussian_moments(x), gaussian_moments(y)
    return frechet_distance(ours.mean, ours.cov, theirs.mean, theirs.cov)


def run_end_to_end(case: Case) -> list[Check]:
    """Compares ADM's five numbers from the images, and from the features that it recorded."""
    network, params = load_network(case)
    io, want = case.io, case.config["expected"]
    ours, theirs = (extract(network, params, io[f"{name}_images_u8"]) for name in ("sample", "ref"))
    given = [np.asarray(io[f"{name}_pool"]) for name in ("sample", "ref")]
    checks = [
        Check("pool", ours.pool, given[0], "pool"),
        Check("reference pool", theirs.pool, given[1], "pool"),
        Check(
            "spatial",
            theirs.spatial[: len(io["ref_spatial_first4"])],
            io["ref_spatial_first4"],
            "pool",
        ),
        Check("fid", _fid(ours.pool, theirs.pool), want["fid"], "fid_from_images"),
        Check("sfid", _fid(ours.spatial, theirs.spatial), want["sfid"], "sfid_from_images"),
        Check("fid of given features", _fid(*given), want["fid"], "fid_from_features"),
    ]
    for key, value in want.items():
        if key.startswith("inception_score"):
            size = int(key.removeprefix("inception_score").removeprefix("_split") or 5000)
            score = InceptionScore(ours.logits.shape[1], size)
            score.update(ours.logits)
            checks.append(Check(key, score.score(), value, "inception_score_adm"))
    return checks + _shares(given, want)


def _shares(given: list[np.ndarray], want: Mapping[str, Any]) -> list[Check]:
    """Compares precision and recall, for all reference images and for those of a VIRTUAL file."""
    checks = []
    for key, exact in want.items():
        if not key.startswith("float64_distances"):
            continue
        _, _, first = key.partition("_first_")
        reference = given[1][: int(first)] if first else given[1]
        official = want[f"virtual_ref_first_{first}"] if first else want
        found = precision_recall(given[0], reference)
        for name, count in (("precision", len(given[0])), ("recall", len(reference))):
            value = getattr(found, name)
            one = 1.001 / count
            checks.append(Check(f"{key} {name}", value, exact[name], "share", tolerance=one))
            checks.append(Check(f"official {name} {first}", value, official[name], "share"))
    return checks


RUNNERS = {
    "eval_resize*": (run_resize, lambda config: "cases" in config),
    "eval_inception*": (run_blocks, lambda config: "blocks" in config),
    "eval_inception_*": (run_network, lambda config: "num_classes" in config),
    "eval_adm*": (
        run_end_to_end,
        lambda config: {"fid", "sfid", "precision", "recall"} <= set(config.get("expected", {})),
    ),
}
