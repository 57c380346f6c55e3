"""Runs of JiT on digits, by the commands: dropout, class tokens, registers, restarts, samples."""

from collections.abc import Iterator
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest

from dsr_jax import build, sample, train
from dsr_jax import config as configs
from dsr_jax.core.errors import ConfigError
from dsr_jax.core.files import read_json
from dsr_jax.core.trees import flatten_names
from dsr_jax.models.embeddings import sincos_2d
from dsr_jax.telemetry.writers import read_metrics
from dsr_jax.training.state import create_state
from tests.finished_run import final_state
from tests.programs import quick_programs

CONFIG = Path(__file__).parents[1] / "configs" / "jit_h.py"
TINY = (
    "--config.model.hidden_size=16",
    # At the block of the class tokens: one stack less to compile.
    "--config.registers.start=1",
    "--config.optim.lr=2e-3",
    "--config.precision.compute=float32",
    "--config.precision.matmul=highest",
    "--config.ema.decays=(0.5,0.9)",
    "--config.sample.ema=0.5",
    "--config.sample.every_steps=0",
)


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with quick_programs(tmp_path_factory.mktemp("programs")):
        yield


def start(workdir: Path, *overrides: str, arguments: str = "runlocal") -> int:
    return train.main([f"--config={CONFIG}:{arguments}", f"--workdir={workdir}", *TINY, *overrides])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run without interruption."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert start(folder) == 0
    return folder


@pytest.mark.slow
def test_a_run_trains_all_but_the_position_tables(whole: Path) -> None:
    config = configs.load_run(whole)
    assert config.model.name == "jit" and config.model.dropout == 0.2
    metrics = read_metrics(whole)
    assert [record["step"] for record in metrics] == [2, 4, 6, 8]
    assert all(np.isfinite(record["loss"]) for record in metrics)
    state = final_state(whole)
    for name in ("in_context_posemb", "register_tokens", "blocks_reg/adaLN/kernel"):
        assert state[f"opt_state/0/nu/{name}"].any(), name
    for name, side in {"pos_embed": 4, "register_pos_embed": 2}.items():
        assert f"opt_state/0/nu/{name}" not in state, "frozen parameters have no moments"
        np.testing.assert_array_equal(state[f"params/{name}"][0], sincos_2d(16, side))


@pytest.mark.slow
def test_a_resumed_run_has_the_same_dropout(whole: Path, tmp_path: Path) -> None:
    assert start(tmp_path, "--config.train.stop_after_steps=3") == 0
    assert start(tmp_path) == 0
    want, got = final_state(whole), final_state(tmp_path)
    assert got.keys() == want.keys() and int(want["step"]) == 8
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)


def losses(steps: int, *overrides: str) -> list[float]:
    """Losses of the first steps, from parameters that are not zero where the official ones are."""
    plain = "registers=0,class_tokens=0,runlocal"
    config = configs.load(f"{CONFIG}:{plain}", [*TINY, *overrides])
    space, variables = build.make_space(config)
    model, optimizer = build.make_model(config, space), build.make_optimizer(config)
    leaves, tree = jax.tree.flatten(
        jax.eval_shape(lambda: nn.unbox(build.init_params(model, space, 0)))
    )
    random = np.random.default_rng(0)
    values = [random.normal(0, 0.3, leaf.shape).astype(np.float32) for leaf in leaves]
    state = create_state(jax.device_put(jax.tree.unflatten(tree, values)), optimizer)
    step = jax.jit(build.make_step(config, model, space, optimizer))
    batch = {
        "image": random.integers(0, 256, (16, 8, 8, 1)).astype(np.uint8),
        "label": np.arange(16, dtype=np.int32) % 10,
        "index": np.arange(16, dtype=np.uint32),
    }
    found = []
    for _ in range(steps):
        # The step alone moves on: what the losses differ by is drawn.
        _, metrics = step(state, batch, variables)
        state = state.replace(step=state.step + 1)
        found.append(float(metrics["loss"]))
    return found


@pytest.mark.slow
def test_a_step_has_dropout_if_the_config_enables_it() -> None:
    kept, dropped = losses(2, "--config.model.dropout=0"), losses(2)
    assert all(abs(one - other) > 1e-3 for one, other in zip(kept, dropped, strict=True))


@pytest.mark.slow
def test_micro_batches_drop_what_the_whole_batch_drops() -> None:
    np.testing.assert_allclose(losses(2, "--config.optim.accumulate=2"), losses(2), rtol=1e-5)


@pytest.mark.slow
def test_sampling_uses_jits_solver_without_dropout(whole: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        sample.main(
            [f"--workdir={whole}", f"--out={tmp_path}", f"--name={name}", "--num-samples=10"]
            + ["--batch=16" if name == "one" else "--batch=8"]
        )
    recipe = read_json(tmp_path / "one.json")["recipe"]
    assert recipe["sampler"]["method"] == "heun-euler"
    assert recipe["sampler"]["open_interval"] and recipe["objective"]["noise_scale"] == 1
    first, second = (np.load(tmp_path / f"{name}.npz")["arr_0"] for name in ("one", "two"))
    assert first.shape == (10, 8, 8, 1) and np.ptp(first) > 5
    assert np.abs(first.astype(int) - second).max() <= 1


@pytest.mark.parametrize(
    ("arguments", "stacks"),
    [
        ("registers=0", {"blocks_pre", "blocks_ctx"}),
        ("class_tokens=0", {"blocks_pre", "blocks_reg"}),
        ("registers=0,class_tokens=0", {"blocks"}),
    ],
)
def test_either_kind_of_tokens_may_be_absent(arguments: str, stacks: set[str]) -> None:
    config = configs.load(f"{CONFIG}:{arguments},runlocal")
    space, _ = build.make_space(config)
    model = build.make_model(config, space)
    params = jax.eval_shape(lambda: build.init_params(model, space, 0))
    assert {name.split("/")[0] for name in flatten_names(params) if "blocks" in name} == stacks
    assert model.forward_flops() > 0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.class_token_start=9", "class_token_start=9 is not one of blocks 0..3"),
        ("model.dropout=1.5", "model.dropout=1.5"),
        ("model.learn_sigma=True", "jit has no such setting"),
        ("objective.noise_scale=0", "noise_scale=0"),
        ("objective.prediction=velocity", "clip_target has no effect on velocity"),
        ("optim.warmup_offset=3", "warmup_offset=3"),
    ],
)
def test_bad_settings_are_refused(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        start(tmp_path / "new", f"--config.{override}")
    assert not (tmp_path / "new").exists()
