"""Converted weights as the start of a run with other classes or another resolution."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from dsr_jax import build
from dsr_jax import config as configs
from dsr_jax.convert.files import save_converted
from dsr_jax.core.errors import ConfigError, ConversionError
from dsr_jax.core.trees import flatten_names
from dsr_jax.models.denoiser import Denoiser
from dsr_jax.models.dit import LightningDiT
from dsr_jax.models.embeddings import LABEL_STD, sincos_2d
from dsr_jax.models.registry import model_sizes
from dsr_jax.training.state import TrainState
from tests.tiny_denoisers import random_params

OLD = LightningDiT(
    input_size=8, in_channels=1, hidden_size=16, depth=1, num_heads=2, num_classes=3, patch_size=2
)
NAMES = ["cat", "dog", "newt"]
TABLE = "y_embedder/embedding_table/embedding"


@pytest.fixture(scope="module")
def params() -> Any:
    return random_params(OLD)


@pytest.fixture(scope="module")
def folder(params: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted model of three named classes and 4 x 4 patches."""
    folder = tmp_path_factory.mktemp("converted") / "old"
    record = {"family": "lightningdit", "model": model_sizes(OLD), "class_names": NAMES}
    save_converted(folder, params, record)
    return folder


def start(folder: Path, *names: str, **keys: Any) -> tuple[Denoiser, TrainState]:
    """The model and the first state of a run on classes of these names."""
    config = configs.base_config()
    config.model.update(hidden_size=16, depth=1, num_heads=2, patch_size=2)
    config.registers.num = 0
    config.data.num_classes = 3
    config.train.init_from = str(folder)
    config.update_from_flattened_dict(keys)
    space, _ = build.make_space(config)
    model, optimizer = build.make_model(config, space), build.make_optimizer(config)
    mesh, rules = build.make_mesh(config, jax.devices()[:1]), build.make_rules(config)
    abstract, _ = build.make_state(config, model, space, optimizer, mesh, rules)
    return model, build.start_from(config, model, optimizer, abstract, names)()


def table(state: TrainState) -> np.ndarray:
    return np.asarray(flatten_names(state.params)[TABLE])


def test_rows_follow_the_names_of_classes(folder: Path, params: Any) -> None:
    keys = {"data.num_classes": 4, "train.init_labels": "names"}
    old = flatten_names(params)[TABLE]
    _, state = start(folder, "owl", "newt", "cat", "yak", **keys)
    new = table(state)
    np.testing.assert_array_equal(new[[1, 2, 4]], old[[2, 0, 3]])
    fresh = new[[0, 3]]
    assert 0.5 * LABEL_STD < fresh.std() < 2 * LABEL_STD
    ema = next(iter(state.ema.values()))
    np.testing.assert_array_equal(flatten_names(ema)[TABLE], new)
    others = flatten_names(params)
    del others[TABLE]
    kept = flatten_names(state.params)
    assert all(np.array_equal(kept[name], others[name]) for name in others)


def test_names_come_from_a_file_where_the_record_has_none(params: Any, tmp_path: Path) -> None:
    save_converted(tmp_path / "old", params, {"family": "lightningdit", "model": model_sizes(OLD)})
    keys = {"data.num_classes": 1, "train.init_labels": "names"}
    with pytest.raises(ConfigError, match="converted model has 0 class names.*\n.*init_class_map"):
        start(tmp_path / "old", "dog", **keys)
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    keys["train.init_class_map"] = str(tmp_path / "names.txt")
    _, state = start(tmp_path / "old", "dog", **keys)
    np.testing.assert_array_equal(table(state), flatten_names(params)[TABLE][[1, 3]])


@pytest.mark.parametrize(
    ("option", "classes", "kept"),
    [
        ("extend", 5, {0: 0, 1: 1, 2: 2, 5: 3}),
        ("reset", 2, {2: 3}),
        ("unconditional", 1, {0: 3, 1: 3}),
    ],
)
def test_rows_are_kept_or_initialized(
    folder: Path, params: Any, option: str, classes: int, kept: dict[int, int]
) -> None:
    _, state = start(folder, **{"data.num_classes": classes, "train.init_labels": option})
    new, old = table(state), flatten_names(params)[TABLE]
    assert len(new) == classes + 1
    np.testing.assert_array_equal(new[list(kept)], old[list(kept.values())])
    fresh = np.delete(new, list(kept), axis=0)
    assert not fresh.size or 0.5 * LABEL_STD < fresh.std() < 2 * LABEL_STD


def test_positions_are_resampled_to_another_resolution(folder: Path, params: Any) -> None:
    keys = {"data.image_size": 16, "train.init_positions": "resample"}
    model, state = start(folder, **keys)
    new = np.asarray(flatten_names(state.params)["pos_embed"])
    assert new.shape == (1, model.grid**2, 16)
    # Torch's own resampling of the same table.
    torch = pytest.importorskip("torch")
    old = np.asarray(flatten_names(params)["pos_embed"]).reshape(1, 4, 4, 16).transpose(0, 3, 1, 2)
    want = torch.nn.functional.interpolate(torch.from_numpy(old.copy()), size=8, mode="bicubic")
    np.testing.assert_allclose(
        new.reshape(8, 8, 16), want.numpy()[0].transpose(1, 2, 0), rtol=0, atol=1e-5
    )
    assert not np.allclose(new[0], sincos_2d(16, 8))


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        ({"data.num_classes": 4}, ConversionError, r"data.num_classes: 3 -> 4(.|\n)*names, extend"),
        ({"data.image_size": 16}, ConversionError, r"(.|\n)*init_positions=resample"),
        ({"train.init_labels": "copy"}, ConfigError, "choose from names, extend, reset, uncond"),
        ({"train.init_positions": "crop"}, ConfigError, "use resample"),
        (
            {"train.init_labels": "unconditional"},
            ConfigError,
            "num_classes=3\n.*num_classes=1 and config.objective.label_dropout=0.0",
        ),
        (
            {"train.init_labels": "extend", "data.num_classes": 2},
            ConfigError,
            "from 3 to 2 classes\n.*names or reset",
        ),
        ({"train.init_labels": "names"}, ConfigError, "training data has 0 class names"),
    ],
)
def test_what_does_not_fit_is_an_error_with_the_options(
    folder: Path, keys: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        start(folder, **keys)


def test_no_common_name_is_an_error(folder: Path) -> None:
    with pytest.raises(ConfigError, match="no class name is common.*cat, dog(.|\n)*use reset"):
        start(folder, "yak", "owl", "elk", **{"train.init_labels": "names"})
