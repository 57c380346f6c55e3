"""The recipe of reconstructions, by which a folder takes only one kind of them."""

from pathlib import Path

import pytest

from dsr_jax import config as configs
from dsr_jax.runs.reconstruction import space_recipe

DIGITS = str(Path(__file__).parents[2] / "configs" / "digits.py")


@pytest.mark.parametrize(
    "change",
    [
        *("scale=0.5", "shift=0.5", "preln=True", "image_size=32", "eps=1e-6"),
        *("num_registers=4", "register_scale=2.0", "normal_values='mean'"),
        *("shared_maximum=False", "spare_first_token=False"),
    ],
)
def test_what_changes_reconstructions_is_in_their_recipe(change: str) -> None:
    """Otherwise a stopped evaluation goes on with images of another autoencoder."""
    before = space_recipe(configs.load(DIGITS))
    after = space_recipe(configs.load(DIGITS, [f"--config.space.{change}"]))
    assert before != after
    assert after.keys() - before.keys() <= {change.partition("=")[0]}


def test_a_recipe_of_defaults_is_that_of_earlier_results() -> None:
    recipe = space_recipe(configs.load(DIGITS))
    assert recipe == {"name": "pixels", "image_size": 0, "preln": False, "scale": 0.18215}
