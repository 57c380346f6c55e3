"""Golden cases of scores: Frechet distance, IS, KID, precision and recall, T2I verdicts."""

import csv
import io
import json
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import scipy.special

from dsr_jax.evaluation import clip_score, dpg, geneval
from dsr_jax.evaluation.frechet import frechet_distance, gaussian_moments
from dsr_jax.evaluation.inception_score import InceptionScore, score_splits
from dsr_jax.evaluation.kid import kernel_inception_distance, squared_mmd
from dsr_jax.evaluation.precision_recall import neighbor_radii, precision_recall
from tools.golden.compare import Case, Check, checks_of


def run_frechet(case: Case) -> list[Check]:
    """Compares distances as a fraction of the traces, and moments."""
    checks, io = [], case.io
    for name, want in case.config["expected"].items():
        x, y = (gaussian_moments(io[f"{name}/{key}"]) for key in "xy")
        traces = np.trace(x.cov) + np.trace(y.cov)
        distance = frechet_distance(x.mean, x.cov, y.mean, y.cov)
        limit = 5e-7 * traces + 1e-9
        checks.append(Check(name, distance, want["svd_f64"], "frechet", tolerance=limit))
        for key, moments in (("x", x), ("y", y)):
            for array, kind in ((moments.mean, "mu"), (moments.cov, "sigma")):
                if f"{name}/{kind}_{key}" in io:
                    label = f"{name}/{kind}_{key}"
                    checks.append(Check(label, array, io[label], "moments"))
    return checks


def run_inception_score(case: Case) -> list[Check]:
    """Compares the score by ADM's chunks and by torch-fidelity's splits."""
    io, checks = case.io, []
    logits = io["logits_unbiased_f32"].astype(np.float64)
    ours = io["pool"].astype(np.float64) @ io["fc_weight_in_out"].astype(np.float64)
    checks.append(Check("logits", ours, logits, "forward"))
    if "probs" in io:
        probabilities = scipy.special.softmax(logits[: len(io["probs"])], axis=-1)
        checks.append(Check("probs", probabilities, io["probs"], "forward"))
    shuffled = logits[np.random.RandomState(2020).permutation(len(logits))]
    for key, want in case.config["expected"].items():
        if key.startswith("torch_fidelity_splits"):
            splits, shuffle = key.removeprefix("torch_fidelity_splits").split("_shuffle")
            rows = shuffled if int(shuffle) else logits
            edges = [i * len(rows) // int(splits) for i in range(int(splits) + 1)]
            scores = score_splits(rows, edges)
            for name, value in (("mean", scores.mean()), ("std", scores.std())):
                checks.append(Check(f"{key} {name}", value, want[name], "torch_fidelity_score"))
        elif "split_size_" in key:
            rows = logits + io["fc_bias"] if "with_bias" in key else logits
            size = int(key.split("split_size_")[1].split("_")[0])
            score = InceptionScore(rows.shape[1], size)
            score.update(rows)
            kind = "inception_score" if "float64" in key else "inception_score_adm"
            checks.append(Check(key, score.score(), want, kind))
    return checks


def run_precision_recall(case: Case) -> list[Check]:
    """Compares radii, membership and fractions."""
    checks, io = [], case.io
    for name, want in case.config["expected"].items():
        samples, reference = io[f"{name}/sample"], io[f"{name}/ref"]
        found = precision_recall(samples, reference)
        exact, official = want["float64_exact"], want["adm_tf_cpu_fp16"]
        for share, inside, key in (
            ("precision", found.sample_inside, "sample_in_ref_manifold"),
            ("recall", found.reference_inside, "ref_in_sample_manifold"),
        ):
            # A point on the radius, up to rounding, may count as inside or outside.
            slack = 1.001 / len(inside) if want["min_rel_margin"] < 1e-5 else 1e-12
            value = getattr(found, share)
            wrong = np.mean(inside != io[f"{name}/{key}"])
            ties = max(3.001 / len(inside), 0.03)
            checks += [
                Check(f"{name} {share}", value, exact[share], "share", tolerance=slack),
                Check(f"{name} {key}", wrong, 0.0, "share", tolerance=slack),
                Check(f"{name} official {share}", value, official[share], "share", tolerance=ties),
            ]
        for key, features in (("ref", reference), ("sample", samples)):
            # In units of the largest squared norm, since float32 has seven digits.
            scale = np.square(features, dtype=np.float64).sum(axis=1).max()
            radii = neighbor_radii(jnp.asarray(features - reference.mean(axis=0))) / scale
            expected = io[f"{name}/radii_{key}_sq_f64"] / scale
            checks.append(Check(f"{name} radii {key}", radii, expected, "radii"))
    return checks


def run_kid(case: Case) -> list[Check]:
    """Compares KID by both kernels, and the unbiased distance of the whole sets."""
    checks, (x, y) = [], (case.io["x"], case.io["y"])
    for key, want in case.config["expected"].items():
        if key == "float64_full_unbiased_poly":
            checks.append(Check(key, squared_mmd(x, y), want, "kid_full"))
            continue
        kernel, subsets = key.split("_subsets")
        count, size = (int(number) for number in subsets.split("_size"))
        sigma = float(kernel.removeprefix("rbf_sigma")) if kernel.startswith("rbf") else None
        found = kernel_inception_distance(
            x, y, subsets=count, subset_size=size, sigma=sigma, seed=case.config["rng_seed"]
        )
        checks += [Check(f"{key} {n}", getattr(found, n), want[n], "kid") for n in ("mean", "std")]
    return checks


def run_clip_score(case: Case) -> list[Check]:
    """Compares the score of each pair, and the means by each convention."""
    io, want = case.io, case.config["expected"]
    images, captions = io["image_emb"], io["text_emb"]
    cosine = clip_score.cosines(images, captions)
    scores = clip_score.clip_score(images, captions)
    refs = clip_score.ref_clip_score(images, captions, io["ref_text_emb"])
    pairs = (
        ("cosine", cosine, io["cosine"]),
        ("clip_s", scores, io["clip_s"]),
        ("ref_clip_s", refs, io["ref_clip_s"]),
        ("clip_s_mean", scores.mean(), want["clip_s_mean"]),
        ("ref_clip_s_mean", refs.mean(), want["ref_clip_s_mean"]),
        ("plain_cosine_mean", cosine.mean(), want["plain_cosine_mean"]),
        (
            "torchmetrics",
            max(100 * cosine.mean(), 0),
            want["torchmetrics_style_100x_clipped_mean"],
        ),
    )
    return [Check(label, got, expected, "clip_score") for label, got, expected in pairs]


def run_geneval(case: Case) -> list[Check]:
    """Compares the outcome of every image, the tables of the two box functions, and the summary."""
    images = json.loads(str(case.io["cases_json"]))
    tables = json.loads(str(case.io["functions_json"]))
    verdicts = [
        geneval.is_correct(
            image["metadata"],
            image["detections"],
            lambda name, numbers, image=image: [image["colors"][name][n] for n in numbers],
        )
        for image in images
    ]
    tags = [image["metadata"]["tag"] for image in images]
    summary = geneval.summarize(tags, [image["prompt_index"] for image in images], verdicts)
    want = case.config["expected_summary"]
    checks = [
        Check("verdicts", verdicts, [image["correct"] for image in images], "exact"),
        Check(
            "overlap",
            [geneval.overlap(row["a"], row["b"]) for row in tables["iou"]],
            [row["iou"] for row in tables["iou"]],
            "logic",
        ),
        Check(
            "relations that differ",
            sum(
                geneval.relations(row["a"], row["b"]) != set(row["relations_of_a_to_b"])
                for row in tables["rel"]
            ),
            0,
            "exact",
        ),
    ]
    scores = want["task_scores"] | {k: v for k, v in want.items() if k != "task_scores"}
    found = summary["task_scores"] | summary
    return checks + [Check(key, found[key], value, "logic") for key, value in scores.items()]


def run_dpg(case: Case) -> list[Check]:
    """Compares the scores of every tile, image and category, and the total."""
    want = case.config["expected"]
    questions = dpg.read_questions(str(case.io["csv_text"]))
    found = dpg.score_benchmark(questions, json.loads(str(case.io["answers_json"])))
    checks = [
        Check("score", found["score"], want["dpg_score_x100"], "logic"),
        Check(
            "images that fail",
            set(found["failed"]) == {name for name, _ in want["failed_items"]},
            True,
            "exact",
        ),
        Check("images", set(found["per_image"]) == set(want["per_item"]), True, "exact"),
    ]
    for name, expected in want["per_item"].items():
        tiles = found["per_image"][name]
        checks.append(Check(f"{name} tiles", tiles, expected["per_crop"], "logic"))
        checks.append(Check(name, np.mean(tiles), expected["score"], "logic"))
    for level in ("L1", "L2"):
        ours = found[level.lower()]
        checks.append(Check(level, set(ours) == set(want[f"{level}_x100"]), True, "exact"))
        for name, value in want[f"{level}_x100"].items():
            checks.append(Check(f"{level} {name}", ours[name], value, "logic"))
    return checks


def run_geneval_cases(case: Case) -> list[Check]:
    """Compares the outcome of every made-up image, and the scores of the tasks."""
    verdicts, tags = [], []
    for image in case.config["cases"]:
        boxes: dict[str, list[Any]] = {}
        colors: dict[str, list[str]] = {}
        for found in image["detections"]:
            boxes.setdefault(found["cls"], []).append(found["box"])
            colors.setdefault(found["cls"], []).append(found["color"])
        verdicts.append(
            geneval.is_correct(
                image["metadata"],
                boxes,
                lambda name, numbers, colors=colors: [colors[name][n] for n in numbers],
            )
        )
        tags.append(image["metadata"]["tag"])
    want = [image["correct"] for image in case.config["cases"]]
    found = geneval.summarize(tags, range(len(tags)), verdicts)
    return [
        Check("verdicts", verdicts, want, "exact"),
        Check("overall", found["overall"], case.config["overall"], "logic"),
        *checks_of(found["task_scores"], case.config["per_task"], "logic"),
    ]


def run_dpg_rows(case: Case) -> list[Check]:
    """Compares the scores of every image and category, and the total, of made-up answers."""
    rows, config = case.config["rows"], case.config
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    questions = dpg.read_questions(text.getvalue())
    answers = {
        item: [
            {q.text: config["answers"][f"{q.text}|{tile}"] for q in asked}
            for tile in range(config["pic_num"])
        ]
        for item, asked in questions.items()
    }
    found = dpg.score_benchmark(questions, answers)
    images = {name: np.mean(tiles) for name, tiles in found["per_image"].items()}
    checks = [Check("score", found["score"], config["score"], "logic")]
    checks.append(
        Check("tiles", dpg.tiles(config["pic_num"], config["resolution"]), config["crops"], "exact")
    )
    for ours, want in (
        (images, config["per_image"]),
        (found["l1"], config["l1"]),
        (found["l2"], config["l2"]),
    ):
        checks.append(Check("names", set(ours) == set(want), True, "exact"))
        checks += checks_of(ours, want, "logic")
    return checks


def _expects(*keys: str) -> Any:
    """Returns a test for cases whose expected values have all of these keys."""
    return lambda config: all(key in config.get("expected", {}) for key in keys)


def _expects_rows(key: str) -> Any:
    """Returns a test for cases whose expected values are tables with this column."""

    def supports(config: Mapping[str, Any]) -> bool:
        rows = list(config.get("expected", {}).values())
        return bool(rows) and all(isinstance(row, dict) and key in row for row in rows)

    return supports


RUNNERS = {
    "eval_fid*": (run_frechet, _expects_rows("svd_f64")),
    "eval_inception_s*": (
        run_inception_score,
        lambda config: any("split_size_" in key for key in config.get("expected", {})),
    ),
    "eval_prec_recall*": (run_precision_recall, _expects_rows("float64_exact")),
    "eval_kid*": (run_kid, lambda config: "rng_seed" in config and "expected" in config),
    "eval_clipscore*": (run_clip_score, _expects("clip_s_mean", "ref_clip_s_mean")),
    "t2i_geneval*": (run_geneval_cases, lambda config: "cases" in config),
    "t2i_dpg*": (run_dpg_rows, lambda config: "answers" in config),
    "eval_geneval*": (run_geneval, lambda config: "expected_summary" in config),
    "eval_dpg*": (run_dpg, _expects("dpg_score_x100", "per_item")),
}
