"""The summary of an experiment, for every config file."""

import json
from pathlib import Path

import jax
import pytest

from dsr_jax import config as configs
from dsr_jax.core.errors import MeshError
from tools.describe import describe, format_summary, main

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted(CONFIGS.glob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_config_has_a_summary_without_an_array(path: Path) -> None:
    config = configs.load(str(path))
    if config.space.encoder.startswith("runs/"):
        config = configs.load(f"{path}:runlocal")  # A run's own encoder has no name to go by.
    before = sum(array.nbytes for array in jax.live_arrays())
    summary = describe(config)
    assert sum(array.nbytes for array in jax.live_arrays()) - before < 2**20
    assert sum(summary["parts"].values()) == summary["parameters"] > 0
    state = summary["state"]
    num_ema = len(config.ema.decays)
    assert state["params"]["bytes"] == 4 * summary["parameters"]
    assert ("ema" in state) == (num_ema > 0)
    assert num_ema == 0 or state["ema"]["bytes"] == num_ema * state["params"]["bytes"]
    assert state["opt_state"]["bytes"] >= state["params"]["bytes"]
    assert all(row["bytes"] == row["bytes_per_chip"] for row in state.values())
    text = format_summary("title", summary)
    assert f"{summary['parameters']:,} parameters" in text
    assert ("GFLOPs" in text) != configs.trains_decoder(config)


def test_numbers_of_the_paper_and_a_chip_of_eight() -> None:
    """Source: paper, table of GFLOPs; spec denoiser 1.13 and 8."""
    config = configs.load(
        str(CONFIGS / "rae_dit.py"), ["--config.mesh.data=1", "--config.mesh.fsdp=8"]
    )
    summary = describe(config)
    assert summary["parameters"] == 677_331_328 and summary["latents"] == [16, 16, 768]
    text = format_summary("title", summary)
    assert "262.87 GFLOPs" in text and "10.4% more than without" in text
    assert "1,000,800 steps" in text and "799.9 times 1,281,167" in text
    for row in summary["state"].values():
        assert row["bytes"] / 8 <= row["bytes_per_chip"] < 1.05 * row["bytes"] / 8
    # A chip in one of two groups of eight holds as much.
    assert describe(config_with_groups())["state"] == summary["state"]


def config_with_groups() -> configs.ConfigDict:
    """The same with two groups that hold a state each."""
    return configs.load(
        str(CONFIGS / "rae_dit.py"), ["--config.mesh.data=2", "--config.mesh.fsdp=8"]
    )


def test_the_schedule_of_the_wide_head() -> None:
    """Source: spec denoiser 8: a constant rate for 40 epochs, then linear to epoch 800."""
    rates = describe(configs.load(str(CONFIGS / "rae_dit_dh.py")))["schedule"]["rates"]
    assert rates["0"] == rates["50040"] == 2e-4
    assert rates["500400"] == pytest.approx(2e-4 - 1.8e-4 * (500_400 - 50_040) / 950_760)
    assert rates["1000799"] == pytest.approx(2e-5, rel=1e-5)


def test_the_command_prints_text_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    command = [f"--config={CONFIGS / 'digits.py'}:noregisters", "--chips=4"]
    main([*command, "--config.train.steps=10"])
    text = capsys.readouterr().out
    assert "no registers" in text and "mesh data 4" in text and "10 steps" in text
    main([*command, "--json"])
    summary = json.loads(capsys.readouterr().out)
    assert summary["mesh"] == {"data": 4, "fsdp": 1, "tensor": 1}
    assert summary["data"]["epochs"] == pytest.approx(1_200 * 128 / summary["data"]["images"])


def test_a_mesh_that_cannot_be_is_refused() -> None:
    config = configs.load(str(CONFIGS / "digits.py"), ["--config.mesh.fsdp=3"])
    with pytest.raises(MeshError, match="4 devices"):
        describe(config, chips=4)
