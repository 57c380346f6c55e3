"""The resume contract: the schema's table, and how changes are sorted by it."""

from pathlib import Path

import pytest

from dsr_jax import config as configs
from dsr_jax.config.resume import check_allowed, compare_configs, is_allowed
from dsr_jax.config.schema import SCHEMA, Change, leaves
from dsr_jax.core.errors import ConfigError

DIGITS = str(Path(__file__).parents[2] / "configs" / "digits.py")

FREE = (
    *("model.remat", "model.attention", "model.dropout", "decoder.remat"),
    *("model.unroll", "decoder.unroll"),
    *("optim.lr", "optim.clip_norm", "optim.weight_decay", "optim.accumulate", "optim.schedule"),
    *("ema.decays", "train.steps", "mesh.fsdp", "sharding.rules", "precision.compute"),
    *("log.every_steps", "checkpoint.every_steps", "data.workers", "sample.guidance"),
)
ASK = (
    *("seed", "data.source", "data.root", "data.global_batch", "data.flip"),
    *("objective.prediction", "objective.time_shift", "objective.label_dropout", "lpips.weight"),
)
NEVER = ("model.hidden_size", "model.depth", "registers.num", "data.num_classes", "space.name")


def test_every_key_has_one_line_of_meaning_and_a_sort() -> None:
    assert set(SCHEMA) == {name for name, _ in leaves(configs.base_config())}
    for name, key in SCHEMA.items():
        assert key.meaning and "\n" not in key.meaning, name
    for kind, names in ((Change.FREE, FREE), (Change.ASK, ASK), (Change.NEVER, NEVER)):
        assert {name for name in names if SCHEMA[name].change is not kind} == set()


def test_changes_are_sorted_by_what_they_do() -> None:
    before = configs.to_json(configs.load(DIGITS))
    after = configs.load(
        DIGITS, ["--config.model.remat=full", "--config.seed=3", "--config.model.depth=9"]
    )
    changes = compare_configs(before, after)
    assert changes.free == {"model.remat": "config.model.remat: auto -> full"}
    assert changes.ask == {"seed": "config.seed: 0 -> 3"}
    assert list(changes.never) == ["model.depth"]
    assert compare_configs(configs.to_json(after), after) == ({}, {}, {})


def test_keys_without_effect_may_change() -> None:
    """Those of other input spaces, and of a decoder's losses where a denoiser is trained."""
    before = configs.to_json(configs.load(DIGITS))
    after = configs.load(DIGITS, ["--config.space.encoder=x", "--config.gan.kernel_size=3"])
    changes = compare_configs(before, after)
    assert set(changes.free) == {"space.encoder", "gan.kernel_size"}
    assert not changes.ask and not changes.never


def test_keys_of_the_other_task_may_change() -> None:
    """Sizes of a decoder in a denoiser's run, and sizes of a denoiser in a decoder's."""
    before = configs.to_json(configs.load(DIGITS))
    changes = compare_configs(before, configs.load(DIGITS, ["--config.decoder.depth=3"]))
    assert set(changes.free) == {"decoder.depth"} and not changes.never
    decoder = "--config.decoder.hidden_size=8"
    before = configs.to_json(configs.load(DIGITS, [decoder]))
    changes = compare_configs(before, configs.load(DIGITS, [decoder, "--config.model.depth=3"]))
    assert set(changes.free) == {"model.depth"} and not changes.never
    assert list(compare_configs(before, configs.load(DIGITS)).never) == ["decoder.hidden_size"]


@pytest.mark.parametrize("key", ["space.vae", "space.scale", "space.shift"])
def test_keys_of_the_space_in_use_are_asked_for(key: str) -> None:
    vae = "--config.space.name=vae"
    before = configs.load(DIGITS, [vae])
    after = configs.load(DIGITS, [vae, f"--config.{key}=0.5"])
    assert set(compare_configs(configs.to_json(before), after).ask) == {key}
    assert configs.architecture(before) != configs.architecture(after)


def test_a_denoisers_own_key_is_fixed() -> None:
    """Fields of a class outside the package, which the schema does not list."""
    before, after = (configs.load(DIGITS) for _ in range(2))
    for config, size in ((before, 3), (after, 1)):
        with config.unlocked():
            config.model.kernel_size = size
    saved = configs.to_json(before)
    assert list(compare_configs(saved, after).never) == ["model.kernel_size"]
    # The class got the field after the run's last start.
    del saved["model"]["kernel_size"]
    assert list(compare_configs(saved, after).free) == ["model.kernel_size"]


def test_a_key_younger_than_the_run_had_its_default() -> None:
    before = configs.to_json(configs.load(DIGITS))
    del before["objective"]["noise_scale"]
    assert compare_configs(before, configs.load(DIGITS)) == ({}, {}, {})
    after = configs.load(DIGITS, ["--config.objective.noise_scale=2"])
    assert compare_configs(before, after).ask == {
        "objective.noise_scale": "config.objective.noise_scale: 1.0 -> 2.0"
    }


def test_allowed_names_are_keys_sections_or_the_class_list() -> None:
    check_allowed(["seed", "config.objective.prediction", "data", "classes"])
    assert is_allowed("data.root", ["data"]) and is_allowed("seed", ["config.seed"])
    assert not is_allowed("data.root", ["data.ro", "dat"])
    with pytest.raises(ConfigError, match="seeed: no such key\n.*did you mean seed"):
        check_allowed(["seeed"])
    with pytest.raises(ConfigError, match="model.depth: this decides the parameters"):
        check_allowed(["model.depth"])
