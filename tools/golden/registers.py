"""Golden cases of the search for register neurons."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsr_jax.models.intervention import Intervention
from dsr_jax.models.vit import ViT
from dsr_jax.parallel.mesh import MeshShape, make_mesh
from dsr_jax.registers.neurons import Neurons, neurons_to_mask
from dsr_jax.registers.scoring import Sparsity, rank_neurons, token_norms
from dsr_jax.registers.search import SearchResult, SearchSettings, find_registers
from dsr_jax.registers.trace import Trace, trace_encoder
from tools.golden.compare import Case, Check
from tools.golden.denoiser import nhwc
from tools.golden.encoder import load_encoder


def run_discovery(case: Case) -> list[Check]:
    """Compares scores, rankings, outliers and chosen units of both passes and their variants."""
    config, io = case.config, case.io
    vit, params = load_encoder(case)
    model, images = ViT(vit), nhwc(io["pixel_values"])
    first, second = config["pass1"], config["pass2"]
    mesh = make_mesh(MeshShape(), jax.devices()[:1])

    def search(**changes: Any) -> SearchResult:
        settings = {
            "threshold": config["register_norm_threshold"],
            "detect_block": config["detect_outliers_layer"],
            "highest_block": (first["highest_layer"], second["highest_layer"]),
            "top_k": (first["top_k"], second["top_k"]),
            "num_registers": second["num_registers"],
            "rounds": 1,
            **changes,
        }
        return find_registers(
            model, params, images, SearchSettings(**settings), mesh, batch=4, log=lambda line: None
        )

    both = search(rounds=2)
    checks = _scores("pass1", both.rounds[0].scores, io)
    checks += _scores("pass2", both.rounds[1].scores, io)
    checks += _chosen("pass1", both.rounds[0].chosen, both.rounds[0].scores, first["result"])
    checks += _chosen("pass2", both.rounds[1].chosen, both.rounds[1].scores, second["result"])
    if "merged" in config and not any("tie" in check.label for check in checks):
        merged = {int(block): sorted(units) for block, units in config["merged"].items()}
        ours = {block: sorted(units) for block, units in both.neurons.items()}
        checks.append(_same("merged", ours, merged))
    if "pass1_sparsity_scores" in io:
        checks += _scores("pass1_sparsity", search(sparsity=Sparsity()).rounds[0].scores, io)
    if "pass1_detect_minus2_scores" in io:
        checks += _scores("pass1_detect_minus2", search(detect_block=-2).rounds[0].scores, io)
    if "pass2_asreleased_scores" in io:
        released = search(rounds=2, as_released=True).rounds[1].scores
        checks += _scores("pass2_asreleased", released, io)

    mask = neurons_to_mask(both.rounds[0].chosen, vit.depth, vit.mlp_dim)
    registers = second["num_registers"]
    interventions = {
        "pass1": None,
        "pass2": Intervention(mask=mask, num_registers=registers),
        "pass2_asreleased": Intervention(mask=mask, num_registers=registers, append=False),
    }
    for name, intervention in interventions.items():
        trace = trace_encoder(model, params, jnp.asarray(images), intervention)
        checks += _outliers(name, trace, config, io)
    return checks


def _scores(name: str, scores: np.ndarray, io: Mapping[str, np.ndarray]) -> list[Check]:
    """Compares the table, its sorted scores, and ours of the units in the original's ranking.

    The last instead of the units themselves, since ties may swap units.
    """
    ranked = np.array([scores[pair] for pair in rank_neurons(scores)])
    units = io[f"{name}_rank_layer"], io[f"{name}_rank_neuron"]
    return [
        Check(f"{name}_scores", scores, io[f"{name}_scores"], "encoder"),
        Check(f"{name}_rank_score", ranked, io[f"{name}_rank_score"], "encoder"),
        Check(f"{name}_rank units", scores[units], io[f"{name}_rank_score"], "encoder"),
    ]


def _chosen(
    name: str, chosen: Neurons, scores: np.ndarray, result: Mapping[str, Any]
) -> list[Check]:
    """Compares the chosen units with the original's, up to units with equal scores."""
    wanted = {int(block): list(units) for block, units in result.items()}
    ours, theirs = ({(b, u) for b, us in table.items() for u in us} for table in (chosen, wanted))
    swapped = sorted(ours - theirs), sorted(theirs - ours)
    if any(swapped):
        values = [np.sort([scores[pair] for pair in pairs]) for pairs in swapped]
        return [Check(f"{name} units that tie", values[0], values[1], "encoder")]
    sorted_units = [{b: sorted(us) for b, us in table.items()} for table in (chosen, wanted)]
    return [_same(f"{name} units", *sorted_units)]


def _same(label: str, ours: Any, theirs: Any) -> Check:
    return Check(label, np.array([ours == theirs]), np.array([True]), "exact")


def _outliers(
    name: str, trace: Trace, config: Mapping[str, Any], io: Mapping[str, np.ndarray]
) -> list[Check]:
    """Compares norms at the detection block and which rows are outliers, the mean token first."""
    norms = token_norms(trace.outputs[config["detect_outliers_layer"]], mean_token=True)
    checks = []
    if f"{name}_detect_layer_norms_with_mean_token" in io:
        key = f"{name}_detect_layer_norms_with_mean_token"
        checks.append(Check(key, norms, io[key], "encoder"))
    if f"{name}_outlier_mask_with_mean_token" in io:
        key = f"{name}_outlier_mask_with_mean_token"
        checks.append(Check(key, norms > config["register_norm_threshold"], io[key], "exact"))
    if f"{name}_layer_token_norms" in io:
        by_image = jnp.linalg.norm(trace.outputs, axis=-1).swapaxes(0, 1)
        key = f"{name}_layer_token_norms"
        checks.append(Check(key, by_image, io[key], "encoder"))
    return checks


RUNNERS = {
    "encoder_register_discovery*": (
        run_discovery,
        lambda config: "register_norm_threshold" in config and "pass1" in config,
    ),
}
