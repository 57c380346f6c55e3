"""Combinations of a sweep, and one that is stopped and continued; drawing is a stand-in."""

import argparse

import numpy as np
import pytest

from dsr_jax.core.errors import EvaluationError
from dsr_jax.core.files import write_json
from dsr_jax.evaluation.reference import open_reference
from dsr_jax.evaluation.scoring import Scorer
from tests.tiny_inception import StandIn
from tools import sweep

REAL = np.random.RandomState(0).randint(0, 256, (30, 6, 6, 3)).astype(np.uint8)


def points(existing, **lists):
    args = argparse.Namespace(workdir="run", steps=[], ema=[""], guidance=[1.0], interval=[""])
    vars(args).update(lists)
    return list(sweep.make_points(args, existing))


def test_all_combinations_but_intervals_without_guidance():
    found = points([10, 20], ema=["0.99", "none"], guidance=[1.0, 1.5], interval=["0,1", "0.1,0.9"])
    assert len(found) == 2 * (1 + 2) and {point.step for point in found} == {20}
    assert len({point.name for point in found}) == 6
    assert found[-1].name == "step00000020-emanone-cfg1.5-in0.1to0.9"
    assert found[-1].arguments() == [
        *("--checkpoint-step", "20", "--guidance", "1.5"),
        *("--ema", "none", "--interval", "0.1,0.9"),
    ]
    assert [point.step for point in points([10, 20], steps=[10, 20])] == [10, 20]
    for existing, asked, problem in (
        ([10], [10, 30], r" of steps 30\n.*choose --steps from 10"),
        ([], [], r"\n.*--workdir"),
    ):
        with pytest.raises(EvaluationError, match=f"run holds no checkpoints{problem}"):
            points(existing, steps=asked)


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Runs the tool; returns what was sampled."""
    np.savez(tmp_path / "ref.npz", REAL)
    sampled = []

    def fake_sample(argv):
        args = dict(zip(argv[::2], argv[1::2], strict=True))
        out, scale = tmp_path / "sweep" / args["--name"], float(args["--guidance"])
        out.parent.mkdir(exist_ok=True)
        noise = np.random.RandomState(1).randint(0, 255 // scale, (20, 6, 6, 3))
        np.savez(out.parent / f"{args['--name']}.npz", noise.astype(np.uint8))
        record = {"recipe": {"step": 20, "sampler": {"guidance": scale, "uint8": "truncate"}}}
        write_json(out.parent / f"{args['--name']}.json", record)
        sampled.append(scale)

    def make_scorer(reference, inception, dinov2, batch):
        return Scorer(StandIn(), open_reference(reference))

    monkeypatch.setattr(sweep.sample, "main", fake_sample)
    monkeypatch.setattr(sweep, "make_scorer", make_scorer)
    monkeypatch.setattr(sweep, "list_steps", lambda folder: [20])

    def run(*guidance, count=20):
        sampled.clear()
        files = ["--reference", str(tmp_path / "ref.npz"), "--inception", "x", "--workdir", "run"]
        where = ["--out", str(tmp_path / "sweep"), "--num-samples", str(count)]
        sweep.main([*files, *where, "--metrics", "fid,is", "--guidance", *map(str, guidance)])
        return list(sampled)

    return run


def test_a_longer_list_adds_to_a_sweep(command, tmp_path, capsys):
    assert command(1.0, 2.0) == [1.0, 2.0]
    assert command(1.0, 2.0, 4.0) == [4.0]
    rows = capsys.readouterr().out.split("\nscores ")[-1].splitlines()
    assert len(rows) == 5 and rows[0].split()[-2:] == ["fid", "inception_score"]
    table = (tmp_path / "sweep" / "table.csv").read_text().splitlines()
    assert len(table) == 4 and "1.0" in table[1]
    assert (tmp_path / "sweep" / "fid.png").read_bytes().startswith(b"\x89PNG")
    fids = [float(line.split(",")[-2]) for line in table[1:]]
    assert fids == sorted(fids)


def test_scores_of_another_sweep_are_not_taken(command):
    command(1.0)
    with pytest.raises(EvaluationError, match="computed with other num_samples"):
        command(1.0, count=30)
