"""The recipe of samples, by which a folder takes only images of one kind."""

from pathlib import Path

from dsr_jax import build
from dsr_jax import config as configs

DIGITS = str(Path(__file__).parents[2] / "configs" / "digits.py")


def settings(*overrides: str) -> dict[str, object]:
    config = configs.load(DIGITS, ["--config.space.name=vae", *overrides])
    found: dict[str, object] = build.sampling_recipe(config, 4, "none")["architecture"]
    return {key: value for key, value in found.items() if key.startswith("config.space.")}


def test_the_normalization_of_a_vae_is_in_the_recipe_of_samples() -> None:
    """A shift of 0 is left out, as in the recipes of earlier versions, whose jobs continue."""
    before = {"config.space.name": "vae", "config.space.vae": "", "config.space.scale": 0.18215}
    assert settings() == before
    assert settings("--config.space.shift=0.5") == {**before, "config.space.shift": 0.5}
    assert settings("--config.space.scale=0.5")["config.space.scale"] == 0.5


def test_a_float32_residual_is_not_in_the_recipe() -> None:
    """Recipes of earlier versions do not have it, and their jobs continue."""
    for value, expected in (("float32", None), ("bfloat16", "bfloat16")):
        config = configs.load(DIGITS, [f"--config.precision.residual={value}"])
        recipe = build.sampling_recipe(config, 4, "none")["precision"]
        assert recipe.get("residual") == expected
        assert "residual" not in configs.precision_recipe(config, trained=False)
