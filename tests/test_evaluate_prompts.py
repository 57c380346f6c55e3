"""Benchmarks of prompts: folders for the official tools, resuming, scores of their results."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dsr_jax import evaluate_prompts
from dsr_jax.core.errors import ConfigError, DamagedFileError, EvaluationError
from dsr_jax.data import shapes
from dsr_jax.evaluation import dpg
from dsr_jax.evaluation.prompt_images import image_seeds
from tests import shapes_generator

GOLDEN = Path(__file__).parent / "golden" / "eval_dpg_logic"


def run(*arguments) -> None:
    evaluate_prompts.main([str(argument) for argument in arguments])


def write(benchmark: str, out: Path, *more, generator: str = "gray") -> None:
    run(
        "write", benchmark, f"--out={out}", f"--generator=tests.shapes_generator:{generator}", *more
    )


def files(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()
    }


def metadata_file(folder: Path) -> Path:
    path = folder / "evaluation_metadata.jsonl"
    lines = shapes.evaluation_prompts("train", 2)
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


def test_shapes_from_prompts_to_scores(tmp_path, capsys) -> None:
    for split in shapes.NUM_SCENES:
        out = tmp_path / split
        write("shapes", out, f"--split={split}", "--per-task=6", "--images=2", generator="generate")
        run("score", "shapes", out)
        found = json.loads((tmp_path / f"{split}.scores.json").read_text())["scores"]
        assert found["overall"] == 1 and found["shuffled"]["overall"] < 0.35
    assert "color_attr               1.000" in capsys.readouterr().out


def test_a_stopped_command_continues(tmp_path, monkeypatch) -> None:
    prompts = metadata_file(tmp_path)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    write("geneval", whole, f"--prompts={prompts}", "--batch=7")
    calls, gray = [], shapes_generator.gray

    def failing(texts, seeds):
        calls.append(len(texts))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return gray(texts, seeds)

    failing.recipe = gray.recipe
    with monkeypatch.context() as patch:
        patch.setattr(shapes_generator, "gray", failing)
        with pytest.raises(KeyboardInterrupt):
            write("geneval", stopped, f"--prompts={prompts}", "--batch=5")
    assert calls == [5] * 4 and 0 < len(files(stopped)) < len(files(whole))
    write("geneval", stopped, f"--prompts={prompts}", "--batch=3")
    assert files(stopped) == files(whole)
    write("geneval", stopped, f"--prompts={prompts}")
    with pytest.raises(EvaluationError, match="another recipe: seed differ"):
        write("geneval", stopped, f"--prompts={prompts}", "--seed=1")
    with pytest.raises(EvaluationError, match="generator, model differ"):
        write("geneval", stopped, f"--prompts={prompts}", generator="floats")
    (tmp_path / "stopped.json").unlink()
    with pytest.raises(EvaluationError, match=r"stopped\.json beside it is missing"):
        write("geneval", stopped, f"--prompts={prompts}")


def cut(content: bytes) -> bytes:
    return content[:-20]


def flip(content: bytes) -> bytes:
    return content[:60] + bytes([content[60] ^ 4]) + content[61:]


@pytest.mark.parametrize("damage", [cut, flip, None])
@pytest.mark.parametrize("benchmark", ["geneval", "dpg"])
def test_damaged_images_are_made_again(tmp_path, benchmark, damage) -> None:
    prompts, out = tmp_path / "prompts", tmp_path / "out"
    prompts.mkdir()
    (prompts / "a.txt").write_text("a cat")
    words = f"--prompts={metadata_file(tmp_path) if benchmark == 'geneval' else prompts}"
    write(benchmark, out, words)
    whole = files(out)
    path = sorted(out.rglob("*.png"))[-1]
    path.with_name(f".{path.name}.ab12cd_9.tmp").touch()
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes()))
    write(benchmark, out, words)
    assert files(out) == whole


def test_a_damaged_recipe_is_named(tmp_path) -> None:
    words = f"--prompts={metadata_file(tmp_path)}"
    for content in ("[]", '{"recipe": 3}', "{"):
        (tmp_path / "out.json").write_text(content)
        with pytest.raises(DamagedFileError, match=r"out\.json is damaged"):
            write("geneval", tmp_path / "out", words)


def test_geneval_folders_are_what_the_official_tool_reads(tmp_path) -> None:
    prompts = metadata_file(tmp_path)
    out = tmp_path / "out"
    write("geneval", out, f"--prompts={prompts}", "--images=3")
    lines = [json.loads(line) for line in prompts.read_text().splitlines()]
    seen = []
    # The loop of evaluate_images.py.
    for folder in sorted(os.listdir(out)):
        assert folder.isdigit()
        with open(out / folder / "metadata.jsonl") as file:
            seen.append(json.load(file))
        names = os.listdir(out / folder / "samples")
        assert len(names) == 3 and all(re.match(r"\d+\.png", name) for name in names)
    assert seen == lines
    assert len(np.unique([image_seeds(42, prompt, 4) for prompt in range(50)])) == 200


def test_dpg_folders_are_what_the_official_tool_reads(tmp_path) -> None:
    folder = tmp_path / "prompts"
    folder.mkdir()
    for name in ("10", "2", "partiprompts7.a"):
        (folder / f"{name}.txt").write_text(f"prompt {name}\n")
    write("dpg", tmp_path / "out", f"--prompts={folder}")
    assert sorted(files(tmp_path / "out")) == ["10.png", "2.png", "partiprompts7.png"]
    grid = np.asarray(Image.open(tmp_path / "out" / "2.png"))
    levels = [image_seeds(42, 1, 4)[i] % 251 for i in range(4)]
    # The boxes of compute_dpg_bench.py: left-top, right-top, left-bottom, right-bottom.
    corners = ((0, 0), (8, 0), (0, 8), (8, 8))
    for level, (left, top) in zip(levels, corners, strict=True):
        assert (grid[top : top + 8, left : left + 8] == level).all()
    (folder / "3.txt").write_text(" ")
    with pytest.raises(EvaluationError, match=r"prompt .*3\.txt is empty"):
        write("dpg", tmp_path / "other", f"--prompts={folder}")
    with pytest.raises(EvaluationError, match="holds no prompts"):
        write("dpg", tmp_path / "other", f"--prompts={tmp_path}")


def test_results_of_geneval(tmp_path, capsys) -> None:
    lines = shapes.evaluation_prompts("train", 1)[:2]
    rows = [
        {
            "filename": f"{number:05d}/samples/{image:04d}.png",
            "tag": line["tag"],
            "prompt": line["prompt"],
            "correct": image < number + 1,
            "reason": "",
            "metadata": json.dumps(line),
            "details": "{}",
        }
        for number, line in enumerate(lines)
        for image in range(4)
    ]
    path = tmp_path / "results.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    run("score", "geneval", path, f"--out={tmp_path / 'scores.json'}")
    found = json.loads((tmp_path / "scores.json").read_text())["scores"]
    assert found["task_scores"] == {lines[0]["tag"]: 0.25, lines[1]["tag"]: 0.5}
    assert found["overall"] == 0.375 and found["n_images"] == 8 and found["n_prompts"] == 2
    assert "overall" in capsys.readouterr().out
    box = [0, 0, 9, 9, 0.95]
    red = {"tag": "colors", "include": [{"class": "cat", "count": 1, "color": "red"}]}
    row = {"metadata": red, "detections": {"cat": [box]}}
    rows = [row | {"colors": {"cat": [color]}} for color in ("red", "blue")]
    path.write_text("\n".join(map(json.dumps, rows)))
    run("score", "geneval", path)
    found = json.loads((tmp_path / "results.scores.json").read_text())["scores"]
    assert found["task_scores"] == {"colors": 0.5}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "holds no results"),
        ("{}\n", "line 1 of .* has neither"),
        ('{"tag": "a"', "line 1 of .* is no JSON"),
        ("[]", "line 1 of .* is no JSON object"),
        (
            '\n{"metadata": {"tag": "a", "include": [{"class": "x", "count": 1, "color": "red"}]}, '
            '"detections": {"x": [[0, 0, 1, 1, 1]]}}',
            "line 2 of .* cannot be decided",
        ),
    ],
)
def test_damaged_results_of_geneval(tmp_path, text, problem) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(text)
    with pytest.raises(EvaluationError, match=problem):
        run("score", "geneval", path)


def dpg_details(failed: set[str]) -> tuple[str, list[str]]:
    """Returns the questions, and the lines that compute_dpg_bench.py writes for the answers."""
    with np.load(GOLDEN / "io.npz") as arrays:
        questions, answers = str(arrays["csv_text"]), json.loads(str(arrays["answers_json"]))
    boxes = ["(0, 0, 64, 64)", "(64, 0, 128, 64)", "(0, 64, 64, 128)", "(64, 64, 128, 128)"]
    lines, table = [], dpg.read_questions(questions)
    for item, tiles in answers.items():
        # The tool stops at an image's first tile if that cannot be scored.
        for box, tile in list(zip(boxes, tiles, strict=False))[: 1 if item in failed else 4]:
            for question in table[item]:
                text = question.text
                lines.append(f"images, a/{item}.png, {box}, {text}, {tile[text]}")
    return questions, lines


def test_results_of_dpg(tmp_path, capsys) -> None:
    want = json.loads((GOLDEN / "config.json").read_text())["expected"]
    failed = {name for name, _ in want["failed_items"]}
    questions, lines = dpg_details(failed)
    table, details = tmp_path / "dpg_bench.csv", tmp_path / "run_detail.txt"
    table.write_text(questions)
    details.write_text("\n".join(lines) + "\n")
    run("score", "dpg", details, f"--questions={table}")
    found = json.loads((tmp_path / "run_detail.scores.json").read_text())["scores"]
    assert found["score"] == pytest.approx(want["dpg_score_x100"])
    assert set(found["failed"]) == failed and set(found["per_image"]) == set(want["per_item"])
    assert found["l1"] == pytest.approx(want["L1_x100"])
    assert "images left out" in capsys.readouterr().out
    for change, problem in (
        (lines[:-1], "lacks answers about"),
        ([*lines, "nonsense"], rf"line {len(lines) + 1} of .* is not"),
        (["a/none.png, (0, 0, 1, 1), Is it?, yes"], "line 1 of .* none, which has no questions"),
        ([re.sub(r"\), .*, ", "), Who?, ", lines[0])], "line 1 of .* has none of the questions"),
    ):
        details.write_text("\n".join(change))
        with pytest.raises(EvaluationError, match=problem):
            run("score", "dpg", details, f"--questions={table}")
    with pytest.raises(EvaluationError, match="cannot be read"):
        run("score", "dpg", details, "--questions=missing.csv")


def test_generators_and_folders_that_cannot_be(tmp_path) -> None:
    prompts = metadata_file(tmp_path)
    with pytest.raises(EvaluationError, match=r"float64 \[16, 8, 8, 3\]"):
        write("geneval", tmp_path / "out", f"--prompts={prompts}", generator="floats")
    with pytest.raises(ConfigError, match="no 'nothing'"):
        write("geneval", tmp_path / "other", f"--prompts={prompts}", generator="nothing")
    prompts.write_text('{"prompt": "x"}')
    with pytest.raises(EvaluationError, match='line 1 of .* lacks "prompt" or "tag"'):
        write("geneval", tmp_path / "other", f"--prompts={prompts}")
    with pytest.raises(EvaluationError, match="holds no images in GenEval's layout"):
        run("score", "shapes", tmp_path / "other")
