"""The project against recorded numbers of the original code, and the command that compares them."""

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from tools import check_golden
from tools.golden.compare import find_cases, run_case

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
