"""Configs: typed arguments, overrides, and errors in files."""

from pathlib import Path

import pytest

from dsr_jax import config as configs
from dsr_jax.config.loading import RENAMED
from dsr_jax.config.schema import leaves
from dsr_jax.core.errors import ConfigError

ROOT = Path(__file__).parents[2]
DIGITS = str(ROOT / "configs" / "digits.py")


def test_arguments_are_typed() -> None:
    args = configs.parse_arg("variant=XL,runlocal,lr=1", variant="S", runlocal=False, lr=0.5)
    assert (args.variant, args.runlocal, args.lr) == ("XL", True, 1.0)
    with pytest.raises(ConfigError, match="'sise=3'.*\n.*size"):
        configs.parse_arg("sise=3", size=1)
    with pytest.raises(ConfigError, match="size=big is a str"):
        configs.parse_arg("size=big", size=1)


def test_overrides_reach_their_key() -> None:
    config = configs.load(
        DIGITS,
        ["--config.optim.lr=1", "--config.ema.decays=(0.9,0.99)", "--config.sample.ema=0.9"],
    )
    assert config.optim.lr == 1.0 and config.ema.decays == (0.9, 0.99)
    assert configs.load(DIGITS + ":noregisters").registers.num == 0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--config.optim.lrr=1", "'config.optim.lrr'.*\n.*did you mean config.optim.lr?"),
        ("--config.optim.lr=fast", "config.optim.lr=fast is a str"),
        ("--config.train.steps=1.5", "config.train.steps=1.5 is a float"),
        ("--config.train.steps=0", "config.train.steps=0"),
        ("--config.ema.decays=(1.0,)", "decays holds 1.0"),
        ("--config.sample.ema=0.5", "config.sample.ema='0.5'.*\n.*none, 0.995"),
        ("--config.precision.matmul=int8", "matmul='int8'"),
        ("--steps=3", "'--steps=3' is not understood"),
        ("--config.sample.num=0", "config.sample.num=0"),
        ("--config.sample.batch=0", "config.sample.batch=0"),
        ("--config.sample.every_steps=-1", "config.sample.every_steps=-1.*\n.*0 for none"),
        ("--config.sample.interval=(0.9,)", r"config.sample.interval=\(0.9,\).*\n.*two times"),
        ("--config.sample.interval=(0.9,0.1)", "config.sample.interval"),
        ("--config.checkpoint.keep_every=-3", "config.checkpoint.keep_every=-3"),
        ("--config.checkpoint.restore_step=-2", "restore_step=-2.*\n.*-1 for the newest"),
        ("--config.train.stop_after_steps=-1", "config.train.stop_after_steps=-1"),
        ("--config.data.workers=-1", "config.data.workers=-1"),
    ],
)
def test_bad_overrides_name_the_key(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configs.load(DIGITS, [override])


def test_missing_and_foreign_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(DIGITS).parents[1])
    with pytest.raises(ConfigError, match=r"not found\n.*choose from .*configs/digits.py"):
        configs.load(str(tmp_path / "no.py"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"not found\n.*run from the repository"):
        configs.load(str(tmp_path / "no.py"))
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(ConfigError, match="no get_config"):
        configs.load(str(tmp_path / "empty.py"))


@pytest.mark.parametrize(
    ("line", "message"),
    [("config.optim.lrr = 1.0", "lrr"), ("config.train.steps = 'ten'", "steps")],
)
def test_a_mistake_in_a_file_is_named_with_its_line(
    tmp_path: Path, line: str, message: str
) -> None:
    text = "from dsr_jax.config import base_config\n\ndef get_config(arg):\n"
    path = tmp_path / "mistake.py"
    path.write_text(f"{text}    config = base_config()\n    {line}\n    return config\n")
    with pytest.raises(ConfigError, match=rf"mistake.py, line 5: .*{message}"):
        configs.load(str(path))


def test_old_names_of_keys_are_read(tmp_path: Path) -> None:
    """A command line and a config.json from before the keys had their names."""
    config = configs.load(DIGITS, ["--config.eval.judge="])
    assert config.eval.classifier == ""
    values = configs.to_json(configs.load(DIGITS))
    values["eval"]["judge"] = values["eval"].pop("classifier")
    assert configs.from_json(values, "config.json").eval.classifier == "digits"
    known = dict(leaves(configs.base_config()))
    assert set(RENAMED.values()) <= set(known) and not set(RENAMED) & set(known)


def test_ema_weights_that_are_longer_than_the_run_are_pointed_out() -> None:
    """After 300 steps of decay 0.995 a fifth of the initial weights is still in them."""
    (hint,) = configs.hints(configs.load(DIGITS, ["--config.train.steps=300"]))
    assert "decay 0.995 are longer than the run: after 300 steps 22 % of the initial" in hint
    remedy = [
        "--config.train.steps=300",
        "--config.ema.decays=(0.984,)",
        "--config.sample.ema=0.984",
    ]
    assert remedy[1].removeprefix("--") in hint and remedy[2].removeprefix("--") in hint
    assert configs.hints(configs.load(DIGITS, remedy)) == []
    none = ["--config.train.steps=300", "--config.sample.ema=none"]
    assert configs.hints(configs.load(DIGITS, none)) == []
    assert configs.hints(configs.load(DIGITS, ["--config.train.steps=2000"])) == []
