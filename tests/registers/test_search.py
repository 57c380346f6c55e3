"""The search on a random encoder with planted register neurons and real photographs."""

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsr_jax.core.errors import ConfigError
from dsr_jax.core.files import read_json
from dsr_jax.data.images import decode_image
from dsr_jax.models.vit import ViT, ViTConfig
from dsr_jax.parallel.mesh import MeshShape, make_mesh
from dsr_jax.registers.neurons import Neurons
from dsr_jax.registers.planting import plant_register_neurons
from dsr_jax.registers.report import write_report
from dsr_jax.registers.search import (
    NoOutliersError,
    SearchResult,
    SearchSettings,
    choose_neurons,
    find_registers,
    merge_neurons,
)
from tests.html_pages import check_page
from tests.requirements import require

CONFIG = ViTConfig(
    family="siglip",
    image_size=64,
    patch_size=8,
    hidden_size=64,
    depth=5,
    num_heads=4,
    mlp_dim=128,
    activation="gelu_tanh",
)
MODEL = ViT(CONFIG)
PLANTED: Neurons = {1: [17, 80], 2: [5, 99, 120], 3: [31]}


@pytest.fixture(scope="session")
def images() -> np.ndarray:
    """Crops of scikit-learn's two photographs, uint8 [N, 64, 64, 3]."""
    require("sklearn", "test")
    from sklearn.datasets import load_sample_images

    pictures = load_sample_images().images
    return np.stack(
        [
            picture[y : y + 192 : 3, x : x + 192 : 3]
            for picture in pictures
            for y in (0, 120, 230)
            for x in (0, 200, 400)
        ]
    )


@pytest.fixture(scope="session")
def pixels(images: np.ndarray) -> np.ndarray:
    return (images.astype(np.float32) / 255 - 0.5) / 0.5


@pytest.fixture(scope="session")
def plain() -> Any:
    """Parameters of a random encoder."""
    boxed = MODEL.init(jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    return jax.tree.map(np.asarray, nn.unbox(boxed)["params"])


@pytest.fixture(scope="session")
def planted(plain: Any, pixels: np.ndarray) -> Any:
    """The same with register neurons."""
    return plant_register_neurons(MODEL, plain, pixels, PLANTED)


def search(params: Any, pixels: np.ndarray, devices: int = 1, **settings: Any) -> SearchResult:
    mesh = make_mesh(MeshShape(), jax.devices()[:devices])
    settings = {"top_k": (6,), **settings}
    return find_registers(
        MODEL, params, pixels, SearchSettings(**settings), mesh, batch=4, log=lambda line: None
    )


@pytest.fixture(scope="session")
def found(planted: Any, pixels: np.ndarray) -> SearchResult:
    return search(planted.params, pixels)


def as_sets(neurons: Neurons) -> dict[int, set[int]]:
    return {block: set(units) for block, units in neurons.items()}


def test_finds_exactly_the_planted_neurons_and_removes_their_outliers(
    found: SearchResult, planted: Any
) -> None:
    assert as_sets(found.neurons) == as_sets(PLANTED)
    (only,) = found.rounds
    np.testing.assert_array_equal(only.norms > only.threshold, planted.outliers)
    assert not (only.norms_after > only.threshold).any()
    assert found.ended == "no second population of norms is left"
    normal = only.cosine[~planted.outliers]
    assert normal.mean() > 0.97


def test_batches_and_devices_do_not_change_the_scores(
    found: SearchResult, planted: Any, pixels: np.ndarray
) -> None:
    sharded = search(planted.params, pixels, devices=8)
    np.testing.assert_allclose(sharded.rounds[0].scores, found.rounds[0].scores, rtol=1e-4)
    assert sharded.rounds[0].counted == found.rounds[0].counted
    assert as_sets(sharded.neurons) == as_sets(found.neurons)


def test_a_second_round_finds_what_the_first_was_not_allowed_to_take(
    planted: Any, pixels: np.ndarray
) -> None:
    result = search(planted.params, pixels, top_k=(2, 4), exclude_found=True, rounds=2)
    first, second = (as_sets(done.chosen) for done in result.rounds)
    assert sum(map(len, first.values())) == 2 and sum(map(len, second.values())) == 4
    assert as_sets(result.neurons) == as_sets(PLANTED)
    assert (result.rounds[0].norms_after > result.rounds[0].threshold).any()
    assert not (result.rounds[1].norms_after > result.rounds[0].threshold).any()


def test_an_encoder_without_outliers_is_an_error_with_advice(
    plain: Any, pixels: np.ndarray
) -> None:
    with pytest.raises(NoOutliersError, match="quantiles of the norms") as caught:
        search(plain, pixels)
    assert "one population" in str(caught.value)
    with pytest.raises(NoOutliersError, match="norm above 1e\\+06"):
        search(plain, pixels, threshold=1e6)


def test_the_suggested_threshold_works(planted: Any, pixels: np.ndarray) -> None:
    with pytest.raises(NoOutliersError) as caught:
        search(planted.params, pixels, threshold=1e6)
    advice = str(caught.value)
    suggested = float(advice.split("above and below ")[1].split(":")[0])
    result = search(planted.params, pixels, threshold=suggested)
    assert as_sets(result.neurons) == as_sets(PLANTED)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"detect_block": 5}, "detect_block=5"),
        ({"highest_block": (7,)}, "blocks 0 to 7"),
        ({"top_k": (0,)}, "top_k=0"),
    ],
)
def test_settings_that_do_not_fit_are_named(
    planted: Any, pixels: np.ndarray, settings: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        search(planted.params, pixels, **settings)


def test_choice_respects_blocks_and_exclusions() -> None:
    scores = np.array([[1.0, 9.0], [8.0, 2.0], [7.0, 3.0]])
    assert choose_neurons(scores, 2) == {0: [1], 1: [0]}
    assert choose_neurons(scores, 2, lowest_block=1, highest_block=1) == {1: [0, 1]}
    assert choose_neurons(scores, 2, exclude={0: [1]}) == {1: [0], 2: [0]}
    assert merge_neurons([{2: [1]}, {0: [5], 2: [1, 0]}]) == {0: [5], 2: [1, 1, 0]}


def test_the_report_shows_numbers_and_pictures(
    found: SearchResult, images: np.ndarray, tmp_path: Path
) -> None:
    require("matplotlib", "plots")
    write_report(tmp_path, found, lambda index: images[index], {"encoder": "planted"})
    record = read_json(tmp_path / "report.json")
    (only,) = record["rounds"]
    assert only["outlier_patches_before"] > 0 == only["outlier_patches_after"]
    assert only["cosine_of_normal_patches"]["mean"] > 0.97
    chosen = [entry for entry in only["top_scores"] if entry["chosen"]]
    assert len(chosen) == 6 == record["distinct_neurons"]
    page = (tmp_path / "report.html").read_text()
    for name in ("norms.png", "maps.png", "scores.png"):
        shape = decode_image((tmp_path / name).read_bytes(), name, 32, 3).shape
        assert shape == (32, 32, 3)
    check_page(page)
    assert page.count("data:image/png;base64") == 3
