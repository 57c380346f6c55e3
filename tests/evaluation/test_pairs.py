"""Scores of pairs: means of the functions of one image, restarts, images that do not fit."""

import jax
import numpy as np
import pytest

from dsr_jax.core.errors import EvaluationError
from dsr_jax.evaluation.image_sets import open_images
from dsr_jax.evaluation.pairs import PairScorer
from dsr_jax.evaluation.reconstruction import psnr, ssim
from dsr_jax.models.lpips import LPIPS
from dsr_jax.parallel.mesh import MeshShape, make_mesh

RANDOM = np.random.RandomState(0)
IMAGES = RANDOM.randint(0, 256, (19, 16, 16, 3)).astype(np.uint8)
OUTPUTS = (IMAGES // 2 + RANDOM.randint(0, 100, IMAGES.shape)).astype(np.uint8)


@pytest.fixture
def sets(tmp_path):
    np.savez(tmp_path / "a.npz", IMAGES)
    np.savez(tmp_path / "b.npz", OUTPUTS)
    return [open_images(tmp_path / name) for name in ("a.npz", "b.npz")]


def test_means_over_all_pairs(sets, tmp_path):
    network = LPIPS((2, 2, 2, 2, 2))
    init = jax.jit(network.init)
    params = jax.device_get(init(jax.random.key(0), *(np.zeros((1, 16, 16, 3)),) * 2)["params"])
    mesh = make_mesh(MeshShape())
    found = PairScorer(mesh, 8, network, params).score(*sets, tmp_path / "parts", {})
    assert found["psnr"] == pytest.approx(psnr(IMAGES, OUTPUTS).mean(), rel=1e-12)
    assert found["ssim"] == pytest.approx(ssim(IMAGES, OUTPUTS).mean(), rel=1e-12)
    a, b = (x / np.float32(127.5) - 1 for x in (IMAGES, OUTPUTS))
    want = float(np.mean(jax.jit(network.apply)({"params": params}, a, b)))
    assert found["lpips"] == pytest.approx(want, rel=1e-4) and want > 0


def test_a_stopped_pass_continues(sets, tmp_path, monkeypatch):
    monkeypatch.setattr("dsr_jax.evaluation.pairs._SAVE_EVERY", 8)
    scorer = PairScorer(make_mesh(MeshShape()), 8)
    want = scorer.score(*sets, tmp_path / "whole", {})
    assert set(want) == {"psnr", "ssim"}
    folder, compare, seen = tmp_path / "parts", scorer._score_batch, []

    def stop(first, images, outputs):
        seen.append(len(images))
        if len(seen) == 2:
            raise KeyboardInterrupt
        return compare(first, images, outputs)

    monkeypatch.setattr(scorer, "_score_batch", stop)
    with pytest.raises(KeyboardInterrupt):
        scorer.score(*sets, folder, {})
    assert scorer.score(*sets, folder, {}) == want
    assert seen == [8, 8, 8, 3]
    with pytest.raises(EvaluationError, match="for other images or networks"):
        scorer.score(*sets, folder, {"data": "other"})


def test_other_shapes_are_refused(sets, tmp_path):
    np.savez(tmp_path / "fewer.npz", OUTPUTS[:18])
    scorer = PairScorer(make_mesh(MeshShape()), 8)
    with pytest.raises(EvaluationError, match="reconstructions"):
        scorer.score(sets[0], open_images(tmp_path / "fewer.npz"), tmp_path, {})


def test_damaged_scores_are_made_again(sets, tmp_path, capsys):
    scorer = PairScorer(make_mesh(MeshShape()), 8)
    folder = tmp_path / "parts"
    folder.mkdir()
    (folder / "pairs.npz").write_bytes(b"PK cut short")
    assert scorer.score(*sets, folder, {}) == scorer.score(*sets, tmp_path / "whole", {})
    assert "is damaged" in capsys.readouterr().err
