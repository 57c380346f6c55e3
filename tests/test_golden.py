"""The project against recorded numbers of the original code, and the command that compares them."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from tools import check_golden
from tools.golden.compare import Case, Check, find_cases, run_case

GOLDEN = Path(__file__).parent / "golden"
SMALL = "denoiser_loss_weighting"
SLOW = (
    "denoiser_ddt_reg",
    "denoiser_init_stats",
    "denoiser_jit",
    "denoiser_sampler_ode",
    "denoiser_sit_tiny",
    "denoiser_train_dit",
    "encoder_discriminator",
    "eval_inception_tiny",
    "encoder_stage1_step",
)


def cases():
    """Every case of the folder; those that compile many programs are marked slow."""
    return [
        pytest.param(case, id=case.name, marks=[pytest.mark.slow] if case.name in SLOW else [])
        for case in find_cases(GOLDEN)
    ]


@pytest.mark.parametrize("case", cases())
def test_original_numbers(case):
    with jax.default_matmul_precision("highest"):
        outcome = run_case(case)
    assert outcome.status == "pass", outcome.detail


@pytest.fixture
def folder(tmp_path):
    """A folder with one small case, to be changed."""
    shutil.copytree(GOLDEN / SMALL, tmp_path / SMALL)
    return tmp_path


def check(capsys, *arguments):
    """Runs the command; returns its exit status, first line and last line."""
    status = check_golden.main([str(argument) for argument in arguments])
    lines = capsys.readouterr().out.splitlines()
    return status, lines[0], lines[-1]


def perturb(path, name, factor):
    """Scales one entry of an array of `io.npz`."""
    with np.load(path / "io.npz") as arrays:
        content = dict(arrays)
    content[name].flat[0] *= factor
    np.savez(path / "io.npz", **content)


def test_passing_case(folder, capsys):
    status, first, last = check(capsys, folder, "--require", "*weighting")
    assert status == 0
    assert first.split()[:2] == [SMALL, "pass"]
    assert last == "1 passed, 0 failed, 0 unsupported"


def test_perturbed_array_fails_and_is_named(folder, capsys):
    perturb(folder / SMALL, "shift/loss", 1 + 1e-3)
    status, first, last = check(capsys, folder)
    assert status == 1
    assert first.split()[:2] == [SMALL, "FAIL"] and "shift/loss" in first
    assert last == "0 passed, 1 failed, 0 unsupported"


def test_incomplete_case_fails(folder, capsys):
    (folder / SMALL / "io.npz").unlink()
    status, first, last = check(capsys, folder)
    assert status == 1
    assert "KeyError" in first and last == "0 passed, 1 failed, 0 unsupported"


def test_missing_reference_fails_and_is_named(tmp_path, capsys):
    case = tmp_path / "denoiser_transport_paths"
    shutil.copytree(GOLDEN / case.name, case)
    with np.load(case / "io.npz") as arrays:
        np.savez(case / "io.npz", **{k: v for k, v in arrays.items() if k != "Linear/xt"})
    status, first, _ = check(capsys, tmp_path)
    assert status == 1 and "KeyError" in first and "Linear/xt" in first


def test_reference_that_nothing_reads_fails_and_is_named(folder, capsys):
    with np.load(folder / SMALL / "io.npz") as arrays:
        np.savez(folder / SMALL / "io.npz", **arrays, another=np.zeros(3))
    status, first, _ = check(capsys, folder)
    assert status == 1 and "1 arrays of io.npz were not compared: another" in first


def test_an_outlier_token_does_not_hide_errors_of_the_others():
    want = np.ones((1, 4, 8))
    want[0, 0] *= 1000
    got = want.copy()
    got[0, 1] += 1e-3
    assert Check("tokens", got, want, "encoder").error == pytest.approx(1e-3)
    assert Check("parameters", got, want, "gradient").error == pytest.approx(1e-6)
    images, wrong = np.moveaxis(want, -1, 1)[..., None], np.moveaxis(got, -1, 1)[..., None]
    assert Check("latents", wrong, images, "encoder").error == pytest.approx(1e-3)


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"warmup_epochs": 0.5, "decay_end_epoch": 3}, (2, 15)),
        ({"warmup_steps": 3, "decay_end_steps": 9}, (3, 9)),
    ],
)
def test_schedules_are_in_epochs_or_in_steps(tmp_path, settings, steps):
    warmup, end = steps
    scheduler = {"type": "linear", "base_lr": 1.0, "final_lr": 0.5, "warmup_from_zero": True}
    table = {"steps_per_epoch": 5, "n": 20, "scheduler": scheduler | settings}
    case = tmp_path / "encoder_lr_schedule_tiny"
    case.mkdir()
    (case / "config.json").write_text(json.dumps({"schedules": [table]}))
    k = np.arange(20)
    fraction = np.clip((k - warmup) / (end - warmup), 0, 1)
    rate = np.where(k < warmup, (k + 1) / warmup, 1 - 0.5 * fraction)
    np.savez(case / "io.npz", lr_0=rate)
    assert run_case(Case(case)).status == "pass"


def test_name_behind_the_prefix_and_depth_of_the_folder_do_not_matter(folder, capsys):
    (folder / "more").mkdir()
    (folder / SMALL).rename(folder / "more" / f"{SMALL}_b8_seed3")
    status, first, last = check(capsys, folder)
    assert status == 0
    assert first.split()[:2] == [f"{SMALL}_b8_seed3", "pass"]
    assert last == "1 passed, 0 failed, 0 unsupported"


def test_only_filters(folder, capsys):
    shutil.copytree(folder / SMALL, folder / f"{SMALL}_wrong")
    perturb(folder / f"{SMALL}_wrong", "shift/loss", 2)
    assert check(capsys, folder)[0] == 1
    status, _, last = check(capsys, folder, "--only", SMALL)
    assert status == 0 and last == "1 passed, 0 failed, 0 unsupported"
    assert check_golden.main([str(folder), "--only", "nothing*"]) == 1
    assert "no cases" in capsys.readouterr().err


def test_required_cases_must_exist_be_supported_and_pass(folder, capsys):
    shutil.copytree(folder / SMALL, folder / "unheard_of_kind")
    status, _, last = check(capsys, folder)
    assert status == 0 and last == "1 passed, 0 failed, 1 unsupported"
    assert check(capsys, folder, "--require", SMALL)[0] == 0
    for glob, problem in {
        "unheard_of*": "unheard_of_kind is unsupported",
        "absent*": "absent* names no case",
    }.items():
        assert check_golden.main([str(folder), "--require", SMALL, glob]) == 1
        assert f"required: {problem}" in capsys.readouterr().out.splitlines()
