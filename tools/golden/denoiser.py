"""Golden cases of the LightningDiT network: forward passes, gradients, guidance, tables, start."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dsr_jax.convert.lightningdit import lightningdit_rules
from dsr_jax.convert.rules import flax_to_torch, torch_to_flax
from dsr_jax.core.typing import Params
from dsr_jax.diffusion import guidance
from dsr_jax.models.dit import LightningDiT
from dsr_jax.models.embeddings import sincos_2d
from dsr_jax.models.rope import rope_tables, rotate
from tools.golden.compare import Case, Check


def nhwc(x: np.ndarray) -> np.ndarray:
    """[..., C, h, w] -> [..., h, w, C], contiguous."""
    return np.ascontiguousarray(np.moveaxis(x, -3, -1))


def nchw(x: np.ndarray) -> np.ndarray:
    """[..., h, w, C] -> [..., C, h, w]."""
    return np.moveaxis(np.asarray(x), -1, -3)


def is_lightningdit(config: Mapping[str, Any]) -> bool:
    """True where the case's network is a LightningDiT that the official code can run."""
    name = config.get("module") or config.get("model") or config.get("arch") or ""
    params = config.get("params") or {}
    return "LightningDiT" in name and not params.get("wo_shift", False)


def build_lightningdit(params: Mapping[str, Any]) -> LightningDiT:
    """The model that official constructor arguments describe."""
    registers = params.get("register_len", 0) if params.get("register_conditioning") else 0
    return LightningDiT(
        input_size=params["input_size"],
        in_channels=params["in_channels"],
        hidden_size=params["hidden_size"],
        depth=params["depth"],
        num_heads=params["num_heads"],
        num_classes=params["num_classes"],
        patch_size=params.get("patch_size", 1),
        mlp_ratio=params.get("mlp_ratio", 4.0),
        learn_sigma=params.get("learn_sigma", False),
        use_qknorm=params.get("use_qknorm", False),
        use_swiglu=params.get("use_swiglu", True),
        use_rope=params.get("use_rope", True),
        use_rmsnorm=params.get("use_rmsnorm", True),
        final_norm=not params.get("final_no_ln", False),
        attn_kv_bias=params.get("attn_with_bias", False),
        num_registers=registers,
        register_start=params.get("register_start", 0) if registers else 0,
    )


def load_lightningdit(model: LightningDiT, state: Mapping[str, np.ndarray]) -> Params:
    """Parameters from an official state dict."""
    return torch_to_flax(dict(state), lightningdit_rules(model))


def run_network(case: Case) -> list[Check]:
    """Forward pass with its intermediates, and gradients of sum(out * grad_w)."""
    model = build_lightningdit(case.config["params"])
    params = load_lightningdit(model, case.weights())
    io = case.io
    t, labels = jnp.asarray(io["t"]), jnp.asarray(io["y"], jnp.int32)

    def forward(p: Params, x: jax.Array) -> tuple[jax.Array, Any]:
        out, kept = model.apply({"params": p}, x, t, labels, mutable=["intermediates"])
        return jnp.sum(out * nhwc(io["grad_w"])), (out, kept["intermediates"])

    grad_fn = jax.jit(jax.grad(forward, argnums=(0, 1), has_aux=True))
    (grad_p, grad_x), (out, kept) = grad_fn(params, jnp.asarray(nhwc(io["x"])))
    checks = [Check("out", nchw(out), io["out"], "forward")]
    checks += _intermediates(model, kept, params, io)
    checks.append(Check("grad_x", nchw(grad_x), io["grad_x"], "gradient"))
    gradients = flax_to_torch(grad_p, lightningdit_rules(model))
    for key in io:
        if key.startswith("grad::"):
            name = key.removeprefix("grad::")
            checks.append(Check(key, gradients[name], io[key], "gradient"))
    return checks


def _intermediates(
    model: LightningDiT, kept: Mapping[str, Any], params: Params, io: Mapping[str, np.ndarray]
) -> list[Check]:
    """Embeddings, every block's output and the first block's parts, where the case has them."""
    stacks = [kept[name] for name in ("blocks", "blocks_pre", "blocks_reg") if name in kept]
    time, label, condition = kept["condition"][0]
    first = {name: stacks[0][name][0] for name in ("norm1_out", "attn_out", "mlp_out")}
    found = {
        "x_embedder_out": kept["x_embedder_out"][0],
        "tokens_in": kept["x_embedder_out"][0] + params["pos_embed"],
        "t_emb": time,
        "y_emb": label,
        "c": condition,
        "block0_mod": jnp.concatenate(
            [part[0][:, 0] for part in stacks[0]["modulation_out"][0]], axis=-1
        ),
        "block0_norm1": first["norm1_out"][0],
        "block0_attn": first["attn_out"][0],
        "block0_mlp": first["mlp_out"][0],
        "final_tokens": kept["final_tokens"][0],
    }
    outputs = [layer for stack in stacks for layer in stack["block_out"][0]]
    found |= {f"block{i}_out": output for i, output in enumerate(outputs)}
    if model.num_registers and not model.register_start:
        # The case's tokens_in is recorded behind the registers.
        registers = params["register_tokens"] + params["register_pos_embed"]
        registers = np.broadcast_to(registers, (len(time), *registers.shape[1:]))
        found["tokens_in"] = jnp.concatenate([registers, found["tokens_in"]], axis=1)
    return [Check(name, found[name], io[name], "forward") for name in found if name in io]


def run_guidance(case: Case) -> list[Check]:
    """Classifier-free guidance with official off-intervals, and autoguidance."""
    config, io = case.config, case.io
    model, guide = (build_lightningdit(config[key]) for key in ("params", "guide_params"))
    strong = {"params": load_lightningdit(model, case.weights())}
    weak = {"params": load_lightningdit(guide, case.weights("guide"))}
    half = len(io["y"]) // 2
    x, labels = nhwc(io["x"])[:half], jnp.asarray(io["y"][:half], jnp.int32)
    null = config["params"]["num_classes"]
    off = [tuple(pair) for pair in config["interval"]]
    scale, off_scale = config["cfg_scale"], config["interval_cfg"]

    @jax.jit
    def plain(x: jax.Array, t: jax.Array, y: jax.Array) -> jax.Array:
        return model.apply(strong, x, t, y)

    @jax.jit
    def guided_by(x: jax.Array, t: jax.Array, y: jax.Array) -> jax.Array:
        return guide.apply(weak, x, t, y)

    functions = {
        "always": guidance.classifier_free_off(plain, scale, null),
        "interval_condonly": guidance.classifier_free_off(plain, scale, null, off),
        "interval_scaled": guidance.classifier_free_off(plain, scale, null, off, off_scale),
        "ag_always": guidance.autoguidance_off(plain, guided_by, config["ag_scale"]),
        "ag_interval": guidance.autoguidance_off(plain, guided_by, config["ag_scale"], off),
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
    """Sine-cosine and rotary tables at real sizes, and a rotation."""
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
        checks.append(Check(f"{key}_q_rotated", turned, io[f"{key}_q_rotated"], "forward"))
    return checks


def run_init_stats(case: Case) -> list[Check]:
    """Every tensor of a fresh model has the official initialiser's distribution."""
    checks = []
    for name, entry in case.config["models"].items():
        if "LightningDiT" not in name:
            continue
        model = build_lightningdit(entry["params"])
        size, channels = model.input_size, model.in_channels
        args = jnp.zeros((1, size, size, channels)), jnp.zeros(1), jnp.zeros(1, jnp.int32)
        params = nn.unbox(jax.jit(model.init)(jax.random.key(0), *args))["params"]
        ours = flax_to_torch(jax.tree.map(np.asarray, params), lightningdit_rules(model))
        for key, stats in entry["stats"].items():
            if key.startswith("feat_rope"):
                continue
            checks += _same_distribution(f"{name}/{key}", ours[key], stats)
    return checks


def _same_distribution(label: str, ours: np.ndarray, stats: Mapping[str, Any]) -> list[Check]:
    """Compares shape, mean, spread and bounds within what sampling noise allows."""
    count, spread = ours.size, stats["std"]
    checks = [Check(f"{label}.shape", np.array(ours.shape), np.array(stats["shape"]), "exact")]
    if spread == 0:
        same = np.full(2, stats["mean"])
        return [*checks, Check(label, np.array([ours.min(), ours.max()]), same, "exact")]
    if "pos_embed" in label:
        got = np.array([ours.mean(), ours.std(), ours.min(), ours.max()])
        want = np.array([stats[key] for key in ("mean", "std", "min", "max")])
        return [*checks, Check(label, got, want, "forward")]
    # Two samples of one distribution: means differ by some standard errors, spreads likewise.
    slack = 6 * np.sqrt(2 / count)
    offset = np.array([(ours.mean() - stats["mean"]) / spread, ours.std() / spread - 1])
    within = np.abs(offset) <= slack
    checks.append(Check(f"{label} mean and std", within, np.ones(2, bool), "exact"))
    uniform = stats["max"] < 1.8 * spread
    if uniform:
        # A uniform's bound is sqrt(3) times its standard deviation, and is nearly reached.
        bounds = np.array([-ours.min(), ours.max()]) / np.array([-stats["min"], stats["max"]])
        reached = np.abs(bounds - 1) <= min(0.3, 40 / count)
        checks.append(Check(f"{label} bounds", reached, np.ones(2, bool), "exact"))
    return checks


RUNNERS = {
    "denoiser_lightningdit_cfg*": (run_guidance, is_lightningdit),
    "denoiser_lightningdit_*": (run_network, is_lightningdit),
    "denoiser_tables*": (run_tables, lambda config: "sincos" in config and "rope" in config),
    "denoiser_init_stats*": (run_init_stats, lambda config: "models" in config),
}
