"""Golden cases of the denoisers: forward passes, gradients, guidance, tables, initialization."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dsr_jax.convert.converter import require_converter
from dsr_jax.convert.rules import flax_to_torch, torch_to_flax
from dsr_jax.core.typing import Params
from dsr_jax.diffusion import guidance
from dsr_jax.models.dit import LightningDiT
from dsr_jax.models.dit_dh import DiTDH
from dsr_jax.models.embeddings import sincos_2d
from dsr_jax.models.rope import rope_tables, rotate
from dsr_jax.models.sit import SiT
from dsr_jax.models.transformer import DiffusionTransformer
from tools.golden.compare import Case, Check, checks_of

_STACKS = (
    *("blocks", "blocks_pre", "blocks_reg"),
    *("enc_blocks", "enc_blocks_pre", "enc_blocks_reg", "dec_blocks"),
)
"""Every network's stacks, in the order of their blocks."""

_BLOCK0 = ("block0_mod", "block0_norm1", "block0_attn", "block0_mlp")
"""Parts of the first block, which only LightningDiT's cases record."""


def nhwc(x: np.ndarray) -> np.ndarray:
    """Converts [..., C, h, w] to a contiguous [..., h, w, C]."""
    return np.ascontiguousarray(np.moveaxis(x, -3, -1))


def nchw(x: np.ndarray) -> np.ndarray:
    """Converts [..., h, w, C] to [..., C, h, w]."""
    return np.moveaxis(np.asarray(x), -1, -3)


def architecture(config: Mapping[str, Any]) -> str | None:
    """Returns the name of the case's network; None if we lack it or the official code fails."""
    name = config.get("module") or config.get("model") or config.get("arch") or ""
    known = next((known for known in _BUILDERS if known in name), None)
    return None if (config.get("params") or {}).get("wo_shift", False) else known


def is_denoiser(config: Mapping[str, Any]) -> bool:
    """Whether `architecture` returns a network's name."""
    return architecture(config) is not None


def build_network(name: str, params: Mapping[str, Any]) -> DiffusionTransformer:
    """Builds the model from official constructor arguments."""
    registers = params.get("register_len", 0) if params.get("register_conditioning") else 0
    # The head model takes a pair, too.
    patch, _ = np.broadcast_to(params.get("patch_size", 1), 2).tolist()
    return _BUILDERS[name](
        params,
        input_size=params["input_size"],
        in_channels=params["in_channels"],
        num_classes=params["num_classes"],
        patch_size=patch,
        mlp_ratio=params.get("mlp_ratio", 4.0),
        use_qknorm=params.get("use_qknorm", False),
        use_swiglu=params.get("use_swiglu", True),
        use_rope=params.get("use_rope", True),
        use_rmsnorm=params.get("use_rmsnorm", True),
        num_registers=registers,
        register_start=params.get("register_start", 0) if registers else 0,
    )


def _lightningdit(params: Mapping[str, Any], **shared: Any) -> LightningDiT:
    return LightningDiT(
        hidden_size=params["hidden_size"],
        depth=params["depth"],
        num_heads=params["num_heads"],
        learn_sigma=params.get("learn_sigma", False),
        final_norm=not params.get("final_no_ln", False),
        attn_kv_bias=params.get("attn_with_bias", False),
        **shared,
    )


def _dit_dh(params: Mapping[str, Any], **shared: Any) -> DiTDH:
    (width, head_width), (depth, head_depth), (heads, head_heads) = (
        params[key] for key in ("hidden_size", "depth", "num_heads")
    )
    return DiTDH(
        hidden_size=width,
        depth=depth,
        num_heads=heads,
        decoder_hidden_size=head_width,
        decoder_depth=head_depth,
        decoder_num_heads=head_heads,
        use_pos_embed=params.get("use_pos_embed", True),
        **shared,
    )


def _sit(params: Mapping[str, Any], **shared: Any) -> SiT:
    # The original has no arguments for these.
    fixed = dict.fromkeys(("use_swiglu", "use_rope", "use_rmsnorm", "use_qknorm"), False)
    return SiT(
        hidden_size=params["hidden_size"],
        depth=params["depth"],
        num_heads=params["num_heads"],
        learn_sigma=params.get("learn_sigma", True),
        **{**shared, **fixed, "patch_size": params.get("patch_size", 2)},
    )


_BUILDERS: Mapping[str, Callable[..., DiffusionTransformer]] = {
    "LightningDiT": _lightningdit,
    "DiTwDDTHead": _dit_dh,
    "SiT": _sit,
}


def case_network(
    case: Case, params: str = "params", weights: str = "weights"
) -> tuple[DiffusionTransformer, Params]:
    """Returns a case's network and parameters, by the names of its settings and of their file."""
    model = build_network(architecture(case.config) or "", case.config[params])
    return model, torch_to_flax(case.weights(weights), require_converter(type(model)).rules(model))


def official(model: DiffusionTransformer, tree: Params) -> dict[str, np.ndarray]:
    """Converts a tree shaped like the network's parameters to arrays by official name."""
    return flax_to_torch(
        jax.tree.map(np.asarray, tree), require_converter(type(model)).rules(model)
    )


def run_network(case: Case) -> list[Check]:
    """Compares the forward pass with its intermediates, and gradients of sum(out * grad_w)."""
    model, params = case_network(case)
    io = case.io
    t, labels = jnp.asarray(io["t"]), jnp.asarray(io["y"], jnp.int32)

    def forward(p: Params, x: jax.Array) -> tuple[jax.Array, Any]:
        out, kept = model.apply({"params": p}, x, t, labels, mutable=["intermediates"])
        return jnp.sum(out * nhwc(io["grad_w"])), (out, kept["intermediates"])

    grad_fn = jax.jit(jax.grad(forward, argnums=(0, 1), has_aux=True))
    (grad_p, grad_x), (out, kept) = grad_fn(params, jnp.asarray(nhwc(io["x"])))
    checks = [Check("out", nchw(out), io["out"], "forward")]
    checks += intermediates(model, kept, params, io)
    checks.append(Check("grad_x", nchw(grad_x), io["grad_x"], "gradient"))
    gradients = official(model, grad_p)
    for key in io:
        if key.startswith("grad::"):
            name = key.removeprefix("grad::")
            checks.append(Check(key, gradients[name], io[key], "gradient"))
    return checks


def intermediates(
    model: DiffusionTransformer,
    kept: Mapping[str, Any],
    params: Params,
    io: Mapping[str, np.ndarray],
) -> list[Check]:
    """Compares the recorded embeddings, outputs of all blocks and parts of the first block."""
    stacks = [kept[name] for name in _STACKS if name in kept]
    time, label, condition = kept["condition"][0]
    first = {name: stacks[0][name][0] for name in ("norm1_out", "attn_out", "mlp_out")}
    found = {
        "t_emb": time,
        "y_emb": label,
        "c": condition,
        "block0_mod": jnp.concatenate(
            [part[0][:, 0] for part in stacks[0]["modulation_out"][0]], axis=-1
        ),
        "block0_norm1": first["norm1_out"][0],
        "block0_attn": first["attn_out"][0],
        "block0_mlp": first["mlp_out"][0],
    }
    names = ("x_embedder_out", "s_embedder_out", "s_projected", "final_tokens")
    found |= {name: kept[name][0] for name in names if name in kept}
    outputs = [layer for stack in stacks for layer in stack["block_out"][0]]
    found |= {f"block{i}_out": output for i, output in enumerate(outputs)}
    if isinstance(model, LightningDiT):
        found["tokens_in"] = _tokens_in(model, kept["x_embedder_out"][0], params)
    return checks_of(found, io, "forward", optional=(*_BLOCK0, "c", "tokens_in"))


def _tokens_in(model: LightningDiT, patches: jax.Array, params: Params) -> jax.Array:
    """Returns the input of the first block."""
    tokens = patches + params["pos_embed"]
    if not model.num_registers or model.register_start:
        return tokens
    registers = params["register_tokens"] + params["register_pos_embed"]
    registers = jnp.broadcast_to(registers, (len(tokens), *registers.shape[1:]))
    return jnp.concatenate([registers, tokens], axis=1)


def run_head_network(case: Case) -> list[Check]:
    """Compares the network and its guidance, which is on within a closed interval."""
    config, io = case.config, case.io
    model, params = case_network(case)
    null = config["params"]["num_classes"]
    # In these cases the second half of the batch repeats the first with null labels.
    half = len(io["y"]) // 2
    x, t, labels = nhwc(io["x"]), jnp.asarray(io["t_cfg"]), jnp.asarray(io["y"], jnp.int32)
    plain = _compiled(model, params)
    intervals = {"full": (0.0, 1.0), "interval": tuple(config["cfg_interval"])}
    checks = run_network(case)
    for name, interval in intervals.items():
        strength = guidance.strength_in(config["cfg_scale"], interval)
        guided = guidance.classifier_free(plain, strength, null)
        out = nchw(guided(x[:half], t[:half], labels[:half]))
        want = io[f"cfg_out_{name}"]
        checks.append(Check(f"cfg_out_{name}", np.concatenate([out, out]), want, "forward"))
    if config["guide_params"]:
        weak = _compiled(*case_network(case, "guide_params", "guide"))
        for name, interval in intervals.items():
            strength = guidance.strength_in(config["ag_scale"], interval)
            guided = guidance.autoguidance(plain, weak, strength)
            out = nchw(guided(x, t, labels))
            checks.append(Check(f"ag_out_{name}", out, io[f"ag_out_{name}"], "forward"))
    return checks


def _compiled(
    model: DiffusionTransformer, params: Params
) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    return jax.jit(lambda x, t, labels: model.apply({"params": params}, x, t, labels))


def strength_off(
    scale: float, off_intervals: Sequence[guidance.Interval] = (), off_scale: float = 0.0
) -> guidance.Strength:
    """Returns the official LightningDiT's guidance scale, whose intervals switch guidance off.

    The half-open intervals are tested on the first sample's time only, and inside them the
    prediction is conditional, or guided by `off_scale` if that exceeds 1 (spec denoiser 1.14).
    """

    def strength(t: jax.Array) -> jax.Array:
        inside = jnp.zeros((), bool)
        for low, high in off_intervals:
            inside |= (t[0] >= low) & (t[0] < high)
        return jnp.where(inside, off_scale if off_scale > 1 else 1.0, scale)

    return strength


def run_guidance(case: Case) -> list[Check]:
    """Compares classifier-free guidance with official off-intervals, and autoguidance."""
    config, io = case.config, case.io
    half = len(io["y"]) // 2
    x, labels = nhwc(io["x"])[:half], jnp.asarray(io["y"][:half], jnp.int32)
    null = config["params"]["num_classes"]
    off = [tuple(pair) for pair in config["interval"]]
    scale, off_scale = config["cfg_scale"], config["interval_cfg"]

    plain = _compiled(*case_network(case))
    guided_by = _compiled(*case_network(case, "guide_params", "guide"))
    functions = {
        "always": guidance.classifier_free(plain, strength_off(scale), null),
        "interval_condonly": guidance.classifier_free(plain, strength_off(scale, off), null),
        "interval_scaled": guidance.classifier_free(
            plain, strength_off(scale, off, off_scale), null
        ),
        "ag_always": guidance.autoguidance(plain, guided_by, strength_off(config["ag_scale"])),
        "ag_interval": guidance.autoguidance(
            plain, guided_by, strength_off(config["ag_scale"], off)
        ),
    }
    checks = []
    for when in ("tin", "tout"):
        t = jnp.asarray(io[when])
        everything = plain(nhwc(io["x"]), t, jnp.asarray(io["y"], jnp.int32))
        checks.append(Check(f"{when}_plain", nchw(everything), io[f"{when}_plain"], "forward"))
        for name, function in functions.items():
            out = nchw(function(x, t[:half], labels))
            want = io[f"{when}_{name}"]
            checks.append(Check(f"{when}_{name}", np.concatenate([out, out]), want, "forward"))
    return checks


def run_tables(case: Case) -> list[Check]:
    """Compares sine-cosine and rotary tables at real sizes, and a rotation."""
    checks, io = [], case.io
    for dim, grid in case.config["sincos"]:
        key = f"sincos_{dim}_{grid}"
        checks.append(Check(key, sincos_2d(dim, grid)[io[f"{key}_rows"]], io[key], "forward"))
    for head_dim, grid, registers in case.config["rope"]:
        key = f"rope_{head_dim}_{grid}_{registers}"
        rows = io[f"{key}_rows"]
        cos, sin = (table[rows] for table in rope_tables(head_dim, grid, registers))
        checks.append(Check(f"{key}_cos", cos, io[f"{key}_cos"], "forward"))
        checks.append(Check(f"{key}_sin", sin, io[f"{key}_sin"], "forward"))
        q = np.moveaxis(io[f"{key}_q"], 1, 2)  # [B, H, L, K] -> [B, L, H, K]
        turned = np.moveaxis(np.asarray(rotate(q, cos, sin)), 2, 1)
        want = io[f"{key}_q_rotated"]
        checks.append(Check(f"{key}_q_rotated", turned, want, "forward", axis=-1))
    return checks


def run_init_stats(case: Case) -> list[Check]:
    """Compares the distribution of every tensor of a new model with the official initializer's."""
    checks = []
    for name, entry in case.config["models"].items():
        if name not in _BUILDERS:
            continue
        model = build_network(name, entry["params"])
        size, channels = model.input_size, model.in_channels
        args = jnp.zeros((1, size, size, channels)), jnp.zeros(1), jnp.zeros(1, jnp.int32)
        params = nn.unbox(jax.jit(model.init)(jax.random.key(0), *args))["params"]
        ours = official(model, params)
        for key, stats in entry["stats"].items():
            if "feat_rope" in key:
                continue
            checks += _same_distribution(f"{name}/{key}", ours[key], stats)
    return checks


def _same_distribution(label: str, ours: np.ndarray, stats: Mapping[str, Any]) -> list[Check]:
    """Compares shape, mean, standard deviation and bounds, within sampling noise."""
    count, std = ours.size, stats["std"]
    checks = [Check(f"{label}.shape", np.array(ours.shape), np.array(stats["shape"]), "exact")]
    if std == 0:
        same = np.full(2, stats["mean"])
        return [*checks, Check(label, np.array([ours.min(), ours.max()]), same, "exact")]
    if "pos_embed" in label:
        got = np.array([ours.mean(), ours.std(), ours.min(), ours.max()])
        want = np.array([stats[key] for key in ("mean", "std", "min", "max")])
        return [*checks, Check(label, got, want, "forward")]
    # In two samples of one distribution, means and standard deviations differ by standard errors.
    slack = 6 * np.sqrt(2 / count)
    offset = np.array([(ours.mean() - stats["mean"]) / std, ours.std() / std - 1])
    within = np.abs(offset) <= slack
    checks.append(Check(f"{label} mean and std", within, np.ones(2, bool), "exact"))
    uniform = stats["max"] < 1.8 * std
    if uniform:
        # A uniform distribution is bounded by sqrt(3) standard deviations; samples come close.
        bounds = np.array([-ours.min(), ours.max()]) / np.array([-stats["min"], stats["max"]])
        reached = np.abs(bounds - 1) <= min(0.3, 40 / count)
        checks.append(Check(f"{label} bounds", reached, np.ones(2, bool), "exact"))
    return checks


RUNNERS = {
    "denoiser_lightningdit_cfg*": (run_guidance, is_denoiser),
    "denoiser_lightningdit_*": (run_network, is_denoiser),
    "denoiser_ddt_*": (run_head_network, is_denoiser),
    "denoiser_tables*": (run_tables, lambda config: "sincos" in config and "rope" in config),
    "denoiser_init_stats*": (run_init_stats, lambda config: "models" in config),
}
