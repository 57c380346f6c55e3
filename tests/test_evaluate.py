"""The evaluate command: real digits score like real digits, and errors end it with a reason."""

import numpy as np
import pytest

from dsr_jax import evaluate
from dsr_jax.core.errors import ConversionError, DataError, EvaluationError, LockError
from dsr_jax.core.files import file_digest, read_json, write_json
from dsr_jax.core.lock import FolderLock
from dsr_jax.data.sources import make_source, read_all
from tests.tiny_inception import convert_tiny

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def heldout():
    return read_all(make_source("digits", split="heldout", image_size=8, channels=1))


@pytest.mark.parametrize("flag", ["--classifier", "--judge"])
def test_scores_and_recipe_are_written_beside_the_samples(tmp_path, capsys, heldout, flag):
    images, labels = heldout
    path = tmp_path / "samples.npz"
    np.savez(path, images, labels=labels)
    write_json(path.with_suffix(".json"), {"recipe": {"guidance": 1.5}})
    evaluate.main([str(path), flag, "digits"])
    written = read_json(tmp_path / "samples.classifier-digits.json")
    scores = written["scores"]
    assert scores["classifier_accuracy"] == scores["classifier_accuracy_real"] > 0.97
    assert scores["frechet_distance"] == scores["frechet_distance_real"] > 0
    assert scores["num_samples"] == len(images)
    assert written["samples"]["digest"] == file_digest(path)
    assert written["samples"]["record"] == {"recipe": {"guidance": 1.5}}
    assert written["provenance"]["packages"]["jax"]
    assert f"{scores['classifier_accuracy']:.5g}" in capsys.readouterr().out


def test_noise_scores_worse_than_digits(tmp_path, heldout):
    images, labels = heldout
    noise = np.random.RandomState(0).randint(0, 256, images.shape).astype(np.uint8)
    np.savez(tmp_path / "noise.npz", noise, labels=labels)
    evaluate.main([str(tmp_path / "noise.npz"), "--out", str(tmp_path / "scores.json")])
    scores = read_json(tmp_path / "scores.json")["scores"]
    assert scores["classifier_accuracy"] < 0.3
    assert scores["frechet_distance"] > 10 * scores["frechet_distance_real"]


def test_what_cannot_be_scored_ends_with_a_reason(tmp_path, heldout):
    images, labels = heldout
    np.savez(tmp_path / "nolabels.npz", images)
    np.savez(tmp_path / "dark.npz", images // 128, labels=labels)
    np.savez(tmp_path / "color.npz", images.repeat(3, axis=-1)[:, :7, :7], labels=labels)
    np.savez(tmp_path / "letters.npz", images, labels=labels + 5)
    for name, reason in {
        "nolabels": "holds no labels",
        "dark": "no value above 1",
        "letters": r"labeled \[10, 11, 12, 13, 14\]",
        "none": "not found",
    }.items():
        with pytest.raises(EvaluationError, match=reason):
            evaluate.main([str(tmp_path / f"{name}.npz")])
    with pytest.raises(DataError, match="cannot become 7 pixels"):
        evaluate.main([str(tmp_path / "color.npz")])
    assert not list(tmp_path.glob("*.json"))


@pytest.fixture
def pictures(tmp_path):
    """The images of 24 samples and 16 real ones, and a narrow network."""
    random = np.random.RandomState(0)
    np.savez(tmp_path / "samples.npz", random.randint(0, 256, (24, 16, 16, 3)).astype(np.uint8))
    np.savez(tmp_path / "real.npz", random.randint(0, 200, (16, 16, 16, 3)).astype(np.uint8))
    return tmp_path, convert_tiny(tmp_path)


def arguments(folder, inception, *more):
    """The command line that scores the pictures."""
    files = [str(folder / "samples.npz"), "--reference", str(folder / "real.npz")]
    return [*files, "--inception", str(inception), *more]


@pytest.mark.slow
def test_scores_against_a_reference_with_their_recipe(pictures, capsys):
    folder, inception = pictures
    evaluate.main(arguments(folder, inception, "--metrics", "fid,is", "--batch", "8"))
    written = read_json(folder / "samples.scores.json")
    assert set(written["scores"]) == {"fid", "inception_score"}
    record = read_json(inception / "conversion.json")
    assert written["recipe"]["weights"] == record["params_digest"]
    assert written["recipe"]["reference"] == file_digest(folder / "real.npz")
    assert written["networks"][0]["source_digest"] == record["source_digest"]
    assert written["samples"]["digest"] == file_digest(folder / "samples.npz")
    assert written["provenance"]["packages"]["jax"]
    printed = capsys.readouterr().out
    assert f"{written['scores']['fid']:.5g}" in printed
    assert "warning: fid of 24 samples" in printed


def test_missing_weights_and_contradictions_end_with_a_reason(pictures):
    folder, inception = pictures
    with pytest.raises(ConversionError, match="pytorch-fid"):
        evaluate.main(arguments(folder, folder / "none"))
    with pytest.raises(EvaluationError, match="need --inception or --dinov2"):
        evaluate.main(arguments(folder, inception)[:3])
    with pytest.raises(EvaluationError, match="--classifier scores without --reference"):
        evaluate.main(arguments(folder, inception, "--classifier", "digits"))
    with pytest.raises(EvaluationError, match="unknown metrics"):
        evaluate.main(arguments(folder, inception, "--metrics", "fid,fdd"))
    assert not list(folder.glob("*.json"))


def test_one_command_at_a_time_writes_a_score_file(pictures):
    folder, inception = pictures
    out = folder / "samples.scores.json"
    with FolderLock(folder, out.name), pytest.raises(LockError, match="in use by process"):
        evaluate.main(arguments(folder, inception))
    assert not out.exists()


def test_file_metadata_is_checked_before_the_network_runs(pictures, monkeypatch):
    folder, inception = pictures

    def run(*args, **kwargs):
        raise AssertionError("the network ran")

    monkeypatch.setattr("dsr_jax.evaluation.features.Extractor.__call__", run)
    random = np.random.RandomState(1)
    moments = {"mu": np.zeros(7), "sigma": np.eye(7)}
    for name, content, reason in (
        ("small", {"arr_0": random.randint(0, 256, (16, 8, 8, 3), np.uint8)}, "16, 16.*8, 8"),
        ("narrow", moments, "fid: sample features have width 128, reference features 7"),
        ("single", {"arr_0": random.randint(0, 256, (1, 16, 16, 3), np.uint8)}, "at least 2 ref"),
        ("empty", {"other": np.zeros(3)}, "no statistics and no images"),
    ):
        np.savez(folder / f"{name}.npz", **content)
        line = [str(folder / "samples.npz"), "--reference", str(folder / f"{name}.npz")]
        with pytest.raises(EvaluationError, match=reason):
            evaluate.main([*line, "--inception", str(inception), "--metrics", "fid"])
    (folder / "file").write_text("x")
    for out, reason in (
        (folder, "is a folder"),
        (folder / "file" / "scores.json", "nothing can be written into"),
        (folder / "real.npz", "exists and holds no scores"),
    ):
        with pytest.raises(EvaluationError, match=reason):
            evaluate.main(arguments(folder, inception, "--out", str(out)))
    assert (folder / "file").read_text() == "x"


@pytest.mark.parametrize(
    ("flag", "value"), [("--batch", "0"), ("--batch", "-4"), ("--save-every", "-1")]
)
def test_counts_that_are_not_positive_are_refused(flag, value, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate.main(["samples.npz", flag, value])
    assert stop.value.code == 2
    assert f"argument {flag}: {value} is not positive" in capsys.readouterr().err


def test_scores_of_another_origin_are_not_overwritten(tmp_path, heldout):
    images, labels = heldout
    np.savez(tmp_path / "a.npz", images, labels=labels)
    np.savez(tmp_path / "b.npz", images[:50], labels=labels[:50])
    out = tmp_path / "scores.json"
    for _ in range(2):
        evaluate.main([str(tmp_path / "a.npz"), "--out", str(out)])
    before = out.read_bytes()
    with pytest.raises(EvaluationError, match="scores of other samples"):
        evaluate.main([str(tmp_path / "b.npz"), "--out", str(out)])
    assert out.read_bytes() == before
    for content in (b"notes", b"[1, 2]", b'{"scores": {}}'):
        out.write_bytes(content)
        with pytest.raises(EvaluationError, match="exists and holds no scores"):
            evaluate.main([str(tmp_path / "a.npz"), "--out", str(out)])
        assert out.read_bytes() == content


def test_a_folder_without_a_reference_asks_for_one(tmp_path):
    with pytest.raises(EvaluationError, match="(?s)none is named.*--reference"):
        evaluate.main([str(tmp_path)])
    with pytest.raises(EvaluationError, match="none is named"):
        evaluate.main([str(tmp_path / "samples.npz"), "--inception", "converted/inception"])


def test_help_names_defaults(capsys):
    with pytest.raises(SystemExit):
        evaluate.main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "over all devices (default: 64)" in shown and "(default: 5000)" in shown
    assert "default: those of fid,sfid,is,pr that the reference allows" in shown
