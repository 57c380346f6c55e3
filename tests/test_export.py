"""Export of a run's weights as the original's checkpoint: same names, shapes and bits."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from dsr_jax import config as configs
from dsr_jax import export
from dsr_jax.build import make_optimizer
from dsr_jax.build.from_run import load_denoiser
from dsr_jax.config import base_config
from dsr_jax.convert.converter import require_converter
from dsr_jax.convert.families import converters, export_denoiser
from dsr_jax.convert.files import load_converted
from dsr_jax.convert.rules import torch_to_flax
from dsr_jax.core.errors import CheckpointError, ConfigError, ConversionError
from dsr_jax.core.trees import flatten_names
from dsr_jax.models.registry import denoiser_name, model_sizes
from dsr_jax.models.transformer import DiffusionTransformer
from dsr_jax.runs.folder import write_run_files
from dsr_jax.training.checkpoints import Checkpoints
from dsr_jax.training.state import create_state
from tests.requirements import require
from tests.tiny_denoisers import random_params

GOLDEN = Path(__file__).parent / "golden"
CASES: dict[str, tuple[str, dict[str, int]]] = {
    "lightningdit_base": ("lightningdit", {}),
    "lightningdit_reg": ("lightningdit", {"register_start": 1}),
    "lightningdit_attnbias": ("lightningdit", {"register_start": 1}),
    "lightningdit_altflags": ("lightningdit", {}),
    "ddt_reg": ("ditdh", {"register_start": 1}),
    "ddt_altflags": ("ditdh", {"decoder_depth": 1}),
    "sit_tiny": ("sit", {"num_heads": 3}),
    "jit": ("jit", {"class_token_start": 1}),
}
MORE = ("lightningdit_base", "lightningdit_attnbias", "lightningdit_altflags", "ddt_altflags")
EMA = 0.9999


def save_run(workdir: Path, model: DiffusionTransformer, params: Any) -> None:
    """Writes a run of one step, whose EMA weights are `params` and whose weights are 1 more."""
    config = base_config()
    config.model.name = denoiser_name(type(model))
    sizes = model_sizes(model)
    config.model.update({key: sizes[key] for key in sizes if key in config.model})
    config.registers.update(num=model.num_registers, start=model.register_start)
    config.registers.gate = model.register_gate
    config.data.update(image_size=model.input_size, channels=model.in_channels)
    config.data.num_classes = model.num_classes
    configs.check(config)
    write_run_files(config, workdir)
    params = jax.tree.map(jnp.asarray, params)
    state = create_state(params, make_optimizer(config), config.ema.decays)
    weights = jax.tree.map(lambda leaf: leaf + 1, params)
    with Checkpoints(workdir / "checkpoints", every_steps=1) as checkpoints:
        checkpoints.save(1, state.replace(params=weights, step=state.step + 1))


def read_golden(case: str) -> tuple[dict[str, np.ndarray], DiffusionTransformer, Any]:
    """The original's state dict of a case, the network that it is of, and its parameters."""
    name, options = CASES[case]
    state = load_file(GOLDEN / f"denoiser_{case}" / "weights.safetensors")
    converter = converters()[name]
    model = converter.infer(state, **options)
    return state, model, torch_to_flax(state, converter.rules(model))


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow if case in MORE else ()) for case in CASES]
)
def test_a_run_exports_the_originals_names_shapes_and_numbers(case: str, tmp_path: Path) -> None:
    state, model, params = read_golden(case)
    require("torch", "torch")  # rope's tables have its bits
    save_run(tmp_path / "run", model, params)
    export.main([f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / 'x.safetensors'}"])
    prefix = require_converter(type(model)).prefix
    exported = {
        name.removeprefix(prefix): value
        for name, value in load_file(tmp_path / "x.safetensors").items()
    }
    # What load_state_dict(strict=True) of the original's class asks for.
    listed = [
        {name: (x.shape, x.dtype) for name, x in found.items()} for found in (exported, state)
    ]
    assert listed[0] == listed[1]
    for name, want in state.items():
        assert np.array_equal(exported[name], want), name


def record_of(model: DiffusionTransformer) -> dict[str, Any]:
    """What a converted folder records of a network."""
    return {"family": denoiser_name(type(model)), "model": model_sizes(model)}


@pytest.mark.parametrize(
    ("kind", "change", "match"),
    [
        ("ditdh", {"patch_size": 2}, "official DiTDH cannot hold .*patches of 2"),
        ("ditdh", {"use_rope": False}, "official DiTDH cannot hold .*no rotary position"),
        ("lightningdit", {"use_rope": False}, "official LightningDiT .*registers without rotary"),
    ],
)
def test_what_the_official_class_cannot_hold_is_refused(
    kind: str, change: dict[str, Any], match: str
) -> None:
    case = {"ditdh": "ddt_reg", "lightningdit": "lightningdit_reg"}[kind]
    model = read_golden(case)[1].clone(**change)
    with pytest.raises(ConversionError, match=match) as caught:
        export_denoiser(random_params(model), record_of(model))
    assert "export to a folder" in caught.value.remedy


def test_registers_that_a_released_class_lacks_are_pointed_out(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = read_golden("sit_tiny")[1].clone(num_registers=4, register_start=1)
    assert "register_tokens" in export_denoiser(random_params(model), record_of(model))
    assert "the released SiT has no registers" in capsys.readouterr().out


def test_torch_files_hold_the_entries_that_the_original_reads(tmp_path: Path) -> None:
    torch = require("torch", "torch")
    for case, entries in (
        ("lightningdit_reg", {"ema"}),
        ("jit", {"model", "model_ema1", "model_ema2"}),
    ):
        state, model, params = read_golden(case)
        save_run(tmp_path / case, model, params)
        export.main([f"--workdir={tmp_path / case}", f"--out={tmp_path / case}.pt"])
        content = torch.load(tmp_path / f"{case}.pt", weights_only=True)
        assert set(content) == entries
        for tensors in content.values():
            prefix = require_converter(type(model)).prefix
            assert set(tensors) == {prefix + name for name in state}
            assert all(
                np.array_equal(tensors[prefix + name], value) for name, value in state.items()
            )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of DiTDH with registers."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    save_run(folder, *read_golden("ddt_reg")[1:])
    return folder


def test_a_folder_keeps_the_tree_and_records_its_source(run: Path, tmp_path: Path) -> None:
    export.main([f"--workdir={run}", f"--out={tmp_path / 'folder'}", "--ema=none"])
    params, record = load_converted(tmp_path / "folder")
    model, _, _, _ = load_denoiser(run)
    assert (record["source"], record["entry"]) == ("run, step 1", "params")
    assert record["family"] == "ditdh" and record["model"] == model_sizes(model)
    _, ema, other, _ = load_denoiser(run, step=1)
    assert other["entry"] == f"ema {EMA}"
    want, got = flatten_names(ema), flatten_names(params)
    assert all(np.array_equal(got[name], want[name] + 1) for name in want)


def test_missing_entries_are_rejected(run: Path, tmp_path: Path) -> None:
    out = f"--out={tmp_path / 'x.safetensors'}"
    with pytest.raises(ConfigError, match="holds no run"):
        export.main([f"--workdir={tmp_path}", out])
    with pytest.raises(CheckpointError, match=r"no EMA weights of decay 0\.5"):
        export.main([f"--workdir={run}", out, "--ema=0.5"])
    with pytest.raises(CheckpointError, match="no checkpoint of step 7"):
        export.main([f"--workdir={run}", out, "--checkpoint-step=7"])
    assert not (tmp_path / "x.safetensors").exists()
    export.main([f"--workdir={run}", out])
    with pytest.raises(ConversionError, match="exists"):
        export.main([f"--workdir={run}", out])
