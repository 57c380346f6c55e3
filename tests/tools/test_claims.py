"""The pieces of the claims experiment whose mistakes its table would not show."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from PIL import Image

from dsr_jax.data.sources import make_source, read_all
from tools.claims.arms import ARMS, to_digits
from tools.claims.encoders import ENCODER, _patches, _unpatch
from tools.claims.report import check_claims, comparison, plot_claims, write_claims


def runs(**distances: float) -> dict[str, list[dict[str, Any]]]:
    """Three seeds of every arm around the given distances, 1 where none is given."""
    return {
        arm: [
            {
                "frechet_distance": distances.get(arm, 1.0) + 0.01 * seed,
                "classifier_accuracy": 0.9,
                "classifier_accuracy_real": 0.98,
                "frechet_distance_real": 0.3,
                "denoiser_outlier_share": 0.01,
                "train_seconds": 10.0,
            }
            for seed in range(3)
        ]
        for arm in ARMS
    }


def test_a_claim_needs_more_than_two_standard_errors() -> None:
    assert comparison([1.0, 1.1, 0.9], [2.0, 2.1, 1.9]).startswith("holds")
    assert comparison([2.0, 2.1, 1.9], [1.0, 1.1, 0.9]).startswith("the opposite")
    assert comparison([1.0, 3.0], [2.0, 2.1]).startswith("no clear difference")
    assert comparison([1.0], [2.0]).startswith("one seed only")


def test_claims_compare_the_right_runs() -> None:
    said = dict(check_claims(runs(clean=1, outlier=3, masked=3, ttr=2, dsr=1)))
    assert [text.split()[0] for text in said.values()] == ["holds", "holds:", *["holds"] * 3]
    said = dict(check_claims(runs(clean=3, outlier=1, masked=0.5, ttr=2, dsr=3)))
    assert list(said.values())[0].startswith("the opposite")
    assert list(said.values())[1].startswith("does not hold")


def test_the_table_has_a_row_for_every_run(tmp_path: Path) -> None:
    shares = {name: {"outlier_share": 0.05} for name in ("clean", "outlier", "cured")}
    text = write_claims(tmp_path, {"encoders": shares}, runs())
    assert all(f"| {title} | 90 +-" in text for title in ARMS.values())
    assert (tmp_path / "claims.md").read_text() == text and (tmp_path / "claims.json").exists()


def test_the_picture_has_a_row_for_every_run(tmp_path: Path) -> None:
    for number, arm in enumerate(ARMS):
        (tmp_path / f"{arm}_0" / "scored").mkdir(parents=True)
        np.savez(
            tmp_path / f"{arm}_0" / "scored" / "samples.npz",
            arr_0=np.full((6, 32, 32, 3), 40 * (number + 1), np.uint8),
            labels=np.arange(6, dtype=np.int32),
        )
    plot_claims(tmp_path, columns=4)
    with Image.open(tmp_path / "claims.png") as picture:
        pixels = np.asarray(picture)
    rows = np.array_split(pixels, len(ARMS))
    grid = 4 * 34 - 2
    assert [int(np.median(row[-20:, -grid:][:, :32])) for row in rows] == [40, 80, 120, 160, 200]
    assert all(row[:, : pixels.shape[1] - grid].any() for row in rows), "a row lacks its name"


def test_enlarged_digits_come_back_as_they_were() -> None:
    small, large = (
        read_all(make_source("digits", image_size=size, channels=channels, split="heldout"))[0]
        for size, channels in ((8, 1), (16, 3))
    )
    np.testing.assert_array_equal(to_digits(large), small)


def test_patches_are_put_back() -> None:
    side = ENCODER.image_size
    images = np.random.default_rng(0).standard_normal((2, side, side, 3)).astype(np.float32)
    patches = _patches(jnp.asarray(images))
    np.testing.assert_array_equal(patches[0, 1], images[0, :4, 4:8].reshape(-1))
    np.testing.assert_array_equal(_unpatch(patches), images)
