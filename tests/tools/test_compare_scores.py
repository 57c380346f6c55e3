"""Scores side by side, or refused."""

import csv
import io

import pytest

from dsr_jax.core.errors import EvaluationError
from dsr_jax.core.files import write_json
from dsr_jax.evaluation.comparison import as_csv
from tools import compare_scores

RECIPE = {
    "weights": "sha256:w",
    "reference": "sha256:r",
    "num_samples": 50000,
    "image_shape": [256, 256, 3],
    "labels": {"classes": 1000, "least": 50, "most": 50},
    "rounding": "truncate",
    "inception_score": {"rows_per_split": 5000, "bias": False},
}


def write(path, guidance, fid, recipe=RECIPE, jax="0.10.2"):
    sampler = {"guidance": guidance, "method": "euler"}
    write_json(
        path,
        {
            "scores": {"fid": fid, "inception_score": 200.0},
            "recipe": recipe,
            "samples": {"record": {"recipe": {"step": 100, "ema": "0.9999", "sampler": sampler}}},
            "provenance": {"packages": {"jax": jax}},
        },
    )
    return str(path)


def test_equal_recipes_make_a_table_and_a_plot(tmp_path, capsys):
    files = [write(tmp_path / f"{g}.json", g, fid) for g, fid in ((1.0, 8.5), (1.5, 2.25))]
    plot, table = tmp_path / "fid.png", tmp_path / "table.csv"
    compare_scores.main([*files, "--plot", str(plot), "--csv", str(table)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == "scores step ema guidance method fid inception_score".split()
    assert lines[2].split() == ["1.5", "100", "0.9999", "1.5", "euler", "2.2500", "200.0000"]
    assert lines[3] == f"2 points: {plot}"
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert table.read_text().splitlines()[1].startswith("1.0,100,0.9999,1.0,euler,8.5")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"weights": "sha256:x"}, "weights: sha256:w | sha256:x"),
        ({"num_samples": 10000}, "num_samples: 50000 | 10000"),
        ({"labels": {"classes": 1000, "least": 31, "most": 70}}, "labels/least: 50 | 31"),
        ({"labels": None}, "labels"),
        ({"image_shape": [512, 512, 3]}, "image_shape"),
        ({"inception_score": {"rows_per_split": 500, "bias": False}}, "rows_per_split: 5000 | 500"),
    ],
)
def test_other_recipes_are_refused_unless_forced(tmp_path, capsys, change, named):
    files = [
        write(tmp_path / "a.json", 1.0, 3.0),
        write(tmp_path / "b.json", 1.0, 2.0, {**RECIPE, **change}),
    ]
    with pytest.raises(EvaluationError, match="by different recipes") as caught:
        compare_scores.main(files)
    assert named in str(caught.value)
    compare_scores.main([*files, "--force"])
    assert "NOT COMPARABLE" in capsys.readouterr().out


def test_a_metric_that_one_file_lacks_is_no_difference(tmp_path, capsys):
    more = {**RECIPE, "precision_recall": {"neighbour": 3}}
    write(tmp_path / "a.json", 1.0, 3.0)
    write(tmp_path / "b.json", 2.0, 2.0, more, jax="0.11.0")
    compare_scores.main([str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    assert "jax in versions 0.10.2, 0.11.0" in capsys.readouterr().err


def test_other_files_are_refused(tmp_path):
    write_json(tmp_path / "classifier.json", {"scores": {"classifier_accuracy": 1.0}})
    with pytest.raises(EvaluationError, match="no scores with their recipe"):
        compare_scores.main([str(tmp_path / "classifier.json")])
    for content in ({"scores": {}, "recipe": {}}, {"scores": 1, "recipe": 2, "samples": 3}):
        write_json(tmp_path / "other.json", content)
        with pytest.raises(EvaluationError, match="other.json holds no scores with their recipe"):
            compare_scores.main([str(tmp_path / "other.json")])
    with pytest.raises(EvaluationError, match="cannot be read"):
        compare_scores.main([str(tmp_path / "none.json")])


def test_csv_values_are_quoted_where_they_must_be() -> None:
    rows = [["scores", "fid"], ['a, "b"', "1.5"], ["two\nlines", ""]]
    assert list(csv.reader(io.StringIO(as_csv(rows)))) == rows
