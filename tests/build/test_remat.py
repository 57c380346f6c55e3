"""Policies of the networks that a config trains."""

from pathlib import Path

import pytest

from dsr_jax import build
from dsr_jax import config as configs
from dsr_jax.build.remat import remat_policies
from dsr_jax.core.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"
TEXT = f"{CONFIGS / 'shapes_t2i.py'}:runlocal"
DIGITS = f"{CONFIGS / 'digits.py'}:runlocal"


@pytest.mark.parametrize(
    ("overrides", "policies", "denoiser", "language"),
    [
        ((), 3, "full", "full"),
        (("--config.model.remat=dots",), 3, "dots", "full"),
        (("--config.language.remat=dots",), 3, "full", "dots"),
        (("--config.model.remat=dots", "--config.language.remat=none"), 1, "dots", "none"),
    ],
)
def test_both_networks_of_text_change_unless_the_config_names_their_policy(
    overrides: tuple[str, ...], policies: int, denoiser: str, language: str
) -> None:
    config = configs.load(TEXT, overrides)
    assert len(remat_policies(config)) == policies
    model = build.with_remat(config, build.make_model(config, build.make_space(config)[0]), "full")
    assert (model.denoiser.remat, model.language.remat) == (denoiser, language)
    planned = build.policy_configs(config)[-1]
    if policies > 1:
        assert (planned.model.remat, planned.language.remat) == (denoiser, language)


def test_a_policy_that_the_config_names_stays() -> None:
    config = configs.load(DIGITS, ["--config.model.remat=dots"])
    model = build.make_model(config, build.make_space(config)[0])
    assert build.with_remat(config, model, "full").remat == "dots"
    assert [candidate.model.remat for candidate in build.policy_configs(config)] == ["dots"]


def test_an_unknown_policy_names_its_key() -> None:
    config = configs.load(TEXT, ["--config.language.remat=some"])
    with pytest.raises(ConfigError, match="config.language.remat='some'.*\n.*auto, none, dots"):
        build.make_model(config, build.make_space(config)[0])
