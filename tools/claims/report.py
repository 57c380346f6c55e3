"""Results of the experiment: its table, and which of the paper's claims hold."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsr_jax.core.files import write_atomic, write_json
from dsr_jax.core.provenance import provenance
from dsr_jax.evaluation.samples import open_samples
from dsr_jax.sampling.images import save_png_grid
from tools.claims.arms import ARMS, VARIANT_OF

Scores = Mapping[str, Sequence[Mapping[str, Any]]]
"""Records of the runs by arm."""

CLAIMS = (
    ("Outlier tokens in the encoder harm the images", "clean", "outlier"),
    ("Masking the outliers' loss does not help", None, None),
    ("Test-time registers help", "ttr", "outlier"),
    ("Diffusion registers help further", "dsr", "ttr"),
    ("Both registers together beat no registers", "dsr", "outlier"),
)


def comparison(better: Sequence[float], worse: Sequence[float]) -> str:
    """Returns a phrase with figures: whether the first distances are smaller than the second.

    A difference of means counts if it exceeds two of its standard errors (Welch).
    """
    a, b = np.asarray(better), np.asarray(worse)
    difference = b.mean() - a.mean()
    if min(len(a), len(b)) < 2:
        return f"one seed only: {difference:+.3g}"
    error = np.sqrt(a.var(ddof=1) / len(a) + b.var(ddof=1) / len(b))
    outcome = "no clear difference"
    if abs(difference) > 2 * error:
        outcome = "holds" if difference > 0 else "the opposite"
    return f"{outcome} ({difference:+.3g} +- {error:.2g})"


def check_claims(scores: Scores) -> list[tuple[str, str]]:
    """Returns each claim with its outcome by Frechet distance."""

    def distances(arm: str) -> list[float]:
        return [run["frechet_distance"] for run in scores[arm]]

    results = []
    for claim, better, worse in CLAIMS:
        if better is None or worse is None:
            helped = comparison(distances("masked"), distances("outlier"))
            outcome = (
                f"does not hold: it helped, {helped}"
                if helped.startswith("holds")
                else (f"holds: masked against unmasked, {helped}")
            )
        else:
            outcome = comparison(distances(better), distances(worse))
        results.append((claim, outcome))
    return results


def plot_claims(out: Path, columns: int = 20) -> None:
    """Writes OUT/claims.png: one row for each of ARMS, one column for each noise and label."""
    rows, labels = [], []
    for arm in ARMS:
        samples = open_samples(out / f"{arm}_0" / "scored" / "samples.npz")
        rows.append(np.asarray(samples.images())[:columns])
        labels.append(samples.require_labels("claims.png")[:columns])
    save_png_grid(
        out / "claims.png",
        np.concatenate(rows),
        np.concatenate(labels),
        columns=len(rows[0]),
        row_names=list(ARMS.values()),
    )


def write_claims(out: Path, stages: Mapping[str, Any], scores: Scores) -> str:
    """Writes claims.md and claims.json to `out` and returns the text of the former."""

    def cell(arm: str, key: str, factor: float = 1.0, digits: int = 3) -> str:
        values = factor * np.asarray([run[key] for run in scores[arm]])
        error = f" +- {values.std(ddof=1):.{digits - 1}g}" if len(values) > 1 else ""
        return f"{values.mean():.{digits}g}{error}"

    lines = [
        "| run | classifier accuracy, % | Frechet distance | encoder outliers, % | "
        "denoiser outliers, % | training, s |",
        "|---|---|---|---|---|---|",
    ]
    for arm, title in ARMS.items():
        share = stages["encoders"][VARIANT_OF[arm]]["outlier_share"]
        lines.append(
            f"| {title} | {cell(arm, 'classifier_accuracy', 100)} | "
            f"{cell(arm, 'frechet_distance')} | "
            f"{100 * share:.2g} | {cell(arm, 'denoiser_outlier_share', 100)} | "
            f"{cell(arm, 'train_seconds')} |"
        )
    first = next(iter(scores.values()))[0]
    lines += [
        f"| real held-out digits | {100 * first['classifier_accuracy_real']:.3g} | "
        f"{first['frechet_distance_real']:.3g} | | | |",
        "",
    ]
    claims = check_claims(scores)
    lines += [f"- {claim}: {outcome}" for claim, outcome in claims]
    text = "\n".join(lines) + "\n"
    write_atomic(out / "claims.md", text)
    write_json(
        out / "claims.json",
        {"stages": stages, "runs": scores, "claims": dict(claims), "provenance": provenance()},
    )
    return text
