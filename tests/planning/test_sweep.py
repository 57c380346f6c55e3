"""Layouts that a sweep tries and skips, and their ranking."""

from pathlib import Path
from typing import Any

import pytest

from dsr_jax import config as configs
from dsr_jax.core.errors import MeshError
from dsr_jax.parallel.topologies import find_topology
from dsr_jax.planning import sweep as sweeps
from dsr_jax.planning.sweep import Trial, sweep, trials

DIGITS = str(Path(__file__).parents[2] / "configs" / "digits.py")
V5E = find_topology("v5e:16x16")


def load(width: int = 1152, batch: int = 1024) -> configs.ConfigDict:
    """The digits config, of another width and batch."""
    return configs.load(
        DIGITS, [f"--config.model.hidden_size={width}", f"--config.data.global_batch={batch}"]
    )


def test_fsdp_divides_width_and_chips() -> None:
    """1152 is 128 x 9."""
    found = list(trials(load(), V5E))
    assert sorted({trial.fsdp for trial in found}) == [1, 4, 8, 16, 32, 64, 128]
    assert {trial.accumulate for trial in found} == {1, 2, 4}
    assert found[0] == Trial(1, "none", 1)


@pytest.mark.parametrize(
    ("batch", "heads", "sizes"), [(1024, 16, {1, 2}), (2048, 16, {1}), (1024, 9, {1})]
)
def test_tensor_of_two_is_tried_where_a_chip_has_few_images(
    batch: int, heads: int, sizes: set
) -> None:
    config = load(batch=batch)
    config.model.num_heads = heads
    found = list(trials(config, V5E, remat=("none",)))
    assert {trial.tensor for trial in found} == sizes
    assert {trial.tensor for trial in trials(config, V5E, tensor=(4,))} == {4}


def test_a_sweep_can_be_kept_short() -> None:
    found = list(trials(load(), V5E, fsdp=(16,), remat=("full",), accumulate=(2,), tensor=(1,)))
    assert found == [Trial(16, "full", 2)]


@pytest.mark.parametrize("sizes", [{"fsdp": (7,)}, {"fsdp": (16,), "tensor": (3,)}])
def test_sizes_that_were_asked_for_are_not_left_out(sizes: dict[str, tuple[int, ...]]) -> None:
    assert list(trials(load(), V5E, remat=("full",), accumulate=(1,), **sizes))


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(MeshError, match="global_batch=256"):
        list(trials(load(batch=200), V5E))


def test_what_cannot_be_better_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weak rematerialization fits with two micro-batches only, full with any number."""
    tried: list[Trial] = []

    def compiled(config: configs.ConfigDict, *_: Any) -> dict[str, Any]:
        trial = Trial(config.mesh.fsdp, config.model.remat, config.optim.accumulate)
        assert config.mesh.data == -1
        tried.append(trial)
        fits = trial.remat == "full" or trial.accumulate >= 2
        seconds = {"none": 1.5, "dots": 1.2, "full": 1.0}[trial.remat] if fits else None
        return {
            "fits": fits,
            "hbm_bytes_per_chip": 2**30,
            "step_seconds_estimate": seconds,
            "mfu_bound": 0.5,
        }

    monkeypatch.setattr(sweeps, "compile_report", compiled)
    config, notes = load(), []
    reports = sweep(config, V5E, {}, trials(config, V5E, fsdp=(16,), tensor=(1,)), notes.append)
    assert [(trial.remat, trial.accumulate) for trial in tried] == [
        *(("none", 1), ("none", 2), ("dots", 1), ("dots", 2), ("full", 1))
    ]
    assert reports[0]["overrides"][3] == "--config.model.remat=full"
    assert [report["fits"] for report in reports] == [True, True, True, False, False]
    assert len(notes) == 5 and "does not fit" in notes[0]
    assert config.model.remat == "auto", "the config itself stays as it is"
