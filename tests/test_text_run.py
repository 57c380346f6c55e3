"""A run on captioned shapes from end to end: training, exact resume, samples of prompts."""

import json

import numpy as np
import pytest
from PIL import Image

from dsr_jax import evaluate_prompts, export, sample, train
from dsr_jax.core.errors import (
    ConfigError,
    ConversionError,
    DataError,
    DsrError,
    EvaluationError,
    PromptError,
)
from dsr_jax.reports.outlier_records import read_history
from dsr_jax.telemetry.writers import read_metrics
from tools import inspect_outliers

ARGS = ["--config=configs/shapes_t2i.py:runlocal", "--config.registers.condition=query"]
PROMPTS = ["a photo of a red square", "a photo of two blue crosses"]


def _train(folder, *more):
    train.main([*ARGS, f"--workdir={folder}", *more])
    return [record["loss"] for record in read_metrics(folder) if "loss" in record]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text") / "run"
    stopped = _train(folder, "--config.train.stop_after_steps=4")
    assert len(stopped) == 2
    measured = ["--config.log.outliers=8", "--config.log.outlier_times=(0.5,)"]
    return folder, _train(folder, *measured)


@pytest.mark.slow
def test_outlier_tokens_of_the_denoiser_are_measured(run, tmp_path):
    folder, _ = run
    history = read_history(read_metrics(folder))
    assert history.steps == (8,) and history.values["norm_p50"].shape == (1, 1, 2)
    assert np.isfinite(history.values["norm_p50"]).all()
    assert history.values["register_attention"][0, 0, 1] > 0
    common = [f"--workdir={folder}", f"--out={tmp_path / 'report.html'}", "--times=0.5"]
    inspect_outliers.main([*common, "--num-images=2", "--samples=2", "--ema=none"])
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png") >= 2 and '"samples":null' not in page.replace(" ", "")
    with pytest.raises(ConfigError, match="has no captions"):
        inspect_outliers.main([*common, f"--images={tmp_path}"])


@pytest.mark.slow
def test_a_continued_run_equals_an_uninterrupted_one(run, tmp_path):
    _, losses = run
    assert len(losses) == 4 and np.isfinite(losses).all()
    assert losses == _train(tmp_path / "whole")


@pytest.mark.slow
def test_a_sharded_state_trains_alike(run, tmp_path):
    mesh = ["--config.mesh.data=2", "--config.mesh.fsdp=4", "--config.sharding.rules=fsdp"]
    few = ["--config.train.steps=2", "--config.sample.every_steps=0", "--config.optim.accumulate=2"]
    losses = _train(tmp_path / "sharded", *mesh, *few)
    np.testing.assert_allclose(losses, run[1][:1], rtol=1e-4)


@pytest.mark.slow
def test_prompts_become_images_with_captions(run, tmp_path):
    folder, _ = run
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS) + "\n")
    # The EMA of so short a run still predicts nothing.
    common = [f"--workdir={folder}", "--ema=none", "--guidance=2", f"--out={tmp_path}"]
    common.append("--images-per-prompt=2")
    sample.main([*common, f"--prompts={file}", "--name=file"])
    flags = [f"--prompt={prompt}" for prompt in PROMPTS]
    sample.main([*common, *flags, "--batch=1", "--name=flags"])
    images = [np.load(tmp_path / f"{name}.npz")["arr_0"] for name in ("file", "flags")]
    assert images[0].shape == (4, 24, 24, 3)
    # Whatever the batch, up to the rounding of matmuls of other shapes.
    assert np.abs(images[0].astype(int) - images[1]).max() <= 1
    assert not np.array_equal(images[0][0], images[0][1])
    record = json.loads((tmp_path / "file.json").read_text())
    assert PROMPTS == _find(record, "prompts") and _find(record, "prompt_of_sample") == [0, 0, 1, 1]
    assert _find(record, "failures") == 0
    with Image.open(tmp_path / "file.png") as picture:
        assert picture.height > 2 * 144


@pytest.mark.slow
def test_a_benchmark_of_a_run(run, tmp_path):
    folder, _ = run
    common = ["write", "shapes", f"--workdir={folder}", "--per-task=1", "--images=2"]
    common.append("--config.sample.ema=none")
    evaluate_prompts.main([*common, f"--out={tmp_path / 'a'}", "--batch=16"])
    paths = sorted((tmp_path / "a").rglob("*.png"))
    assert len(paths) == 12
    for path in paths[3:]:
        path.unlink()
    for path in sorted((tmp_path / "a").rglob("metadata.jsonl"))[1:]:
        path.unlink()
    before = paths[0].read_bytes()
    assert before != paths[1].read_bytes()
    evaluate_prompts.main([*common, f"--out={tmp_path / 'a'}", "--batch=5"])
    assert paths[0].read_bytes() == before and all(path.exists() for path in paths)
    # Whatever the batch, up to the rounding of matmuls of other shapes.
    evaluate_prompts.main([*common, f"--out={tmp_path / 'b'}", "--batch=3"])
    for path in paths:
        ours, theirs = (
            np.asarray(Image.open(tmp_path / name / path.relative_to(tmp_path / "a")), int)
            for name in "ab"
        )
        assert np.abs(ours - theirs).max() <= 1
    evaluate_prompts.main(["score", "shapes", str(tmp_path / "a")])
    recipe = json.loads((tmp_path / "a.json").read_text())["recipe"]
    assert recipe["step"] == 8 and recipe["text"] == "forced"
    with pytest.raises(EvaluationError, match="sampler differ"):
        evaluate_prompts.main([*common, f"--out={tmp_path / 'a'}", "--config.sample.guidance=3"])


def _find(record, key):
    if key in record:
        return record[key]
    values = (_find(value, key) for value in record.values() if isinstance(value, dict))
    return next((value for value in values if value is not None), None)


@pytest.mark.slow
def test_an_exported_run_makes_the_same_images(run, tmp_path):
    folder, _ = run
    export.main([f"--workdir={folder}", f"--out={tmp_path / 'converted'}"])
    common = [f"--prompt={PROMPTS[0]}", f"--out={tmp_path}"]
    sample.main([f"--workdir={folder}", *common, "--name=run"])
    config = [*ARGS, f"--converted={tmp_path / 'converted'}"]
    sample.main([*config, *common, "--name=converted"])
    images = [np.load(tmp_path / f"{name}.npz")["arr_0"] for name in ("run", "converted")]
    np.testing.assert_array_equal(*images)
    with pytest.raises(ConversionError, match="has no registers"):
        export.main([f"--workdir={folder}", f"--out={tmp_path / 'x.safetensors'}"])


@pytest.mark.slow
def test_greedy_answers_that_never_come_to_an_image_are_black_failures(run, tmp_path):
    folder, _ = run
    sample.main(
        [
            *(f"--workdir={folder}", f"--prompt={PROMPTS[0]}", f"--out={tmp_path}", "--name=x"),
            "--config.sample.text=greedy",
        ]
    )
    record = json.loads((tmp_path / "x.json").read_text())
    image = np.load(tmp_path / "x.npz")["arr_0"]
    # An untrained model may or may not begin an image.
    assert (_find(record, "failures") == 1) == (not image.any())


@pytest.mark.slow
def test_bad_prompts_and_flags_are_named(run, tmp_path):
    folder, _ = run
    cases: list[tuple[list[str], type[DsrError], str]] = [
        (["--prompt="], PromptError, "prompt 1: the prompt is empty"),
        ([f"--prompt={'red ' * 60}"], PromptError, "prompt 1.*takes .* tokens"),
        (["--prompt=a <image> of red"], PromptError, "prompt 1.*<image>"),
        (["--prompt=ein Foto"], PromptError, "not in the vocabulary"),
        (["--classes=3"], ConfigError, "model of text"),
        (["--num-samples=3"], ConfigError, "as many samples as prompts"),
        ([f"--prompts={tmp_path / 'none.txt'}"], DataError, "cannot be read"),
    ]
    empty = tmp_path / "empty.txt"
    empty.write_text("a photo of a red square\n\na photo of a blue square\n")
    cases.append(([f"--prompts={empty}"], DataError, "line 2 is empty"))
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"prompt": "a photo of a red square"}\n{"text": "x"}\n')
    cases.append(([f"--prompts={lines}"], DataError, "line 2: no JSON object"))
    for flags, kind, message in cases:
        with pytest.raises(kind, match=message):
            sample.main([f"--workdir={folder}", *flags])


def test_settings_that_cannot_work_are_named(tmp_path):
    cases = {
        "--config.data.flip=True": "mirrors pictures",
        "--config.sample.prompts=()": "no prompt to show",
        "--config.eval.num_samples=8": "config.eval asks for scores",
        "--config.data.latents=cache": "config.data.latents='cache'",
        "--config.data.crop_from=48": "crop_from=48 has no effect",
        "--config.sample.text=free": "choose forced or greedy",
        "--config.model.name=jit": "condition_width=16, but jit has class tokens|takes no text",
        "--config.language.vocab_size=5": "28 ids, the embedding table 5 rows",
        "--config.language.max_length=9": "does not hold a prompt",
        "--config.language.num_heads=5": "does not divide into num_heads=5",
    }
    for flag, message in cases.items():
        with pytest.raises(DsrError, match=message):
            train.main([ARGS[0], f"--workdir={tmp_path / 'run'}", flag])
    assert not (tmp_path / "run" / "config.json").exists()


def test_too_many_targets_are_named():
    from dsr_jax.build.text_to_image import check_targets

    batch = {"targets": np.full((2, 5), 7), "index": np.array([4, 5])}
    batch["targets"][0] = -100
    read = check_targets(lambda step: iter([batch]), 2)
    with pytest.raises(DataError, match="sample 5 of the run has 4 supervised tokens"):
        next(read(0))
    assert next(check_targets(lambda step: iter([batch]), 4)(0)) is batch
