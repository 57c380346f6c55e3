"""Metrics by name and from outside the package: found, passed, scored, restored, refused."""

import sys
import textwrap

import numpy as np
import pytest

from dsr_jax.core.errors import ConfigError, EvaluationError
from dsr_jax.evaluation.image_sets import open_images
from dsr_jax.evaluation.metrics import DEFAULT, METRICS, find_metrics
from dsr_jax.evaluation.reference import open_reference
from dsr_jax.evaluation.scoring import Scorer
from tests.tiny_inception import StandIn

IMAGES = np.random.RandomState(0).randint(0, 256, (40, 6, 6, 3)).astype(np.uint8)
LABELS = np.arange(40) % 4
OWN = """
    import numpy as np
    from dsr_jax.evaluation.metric import Metric

    class ClassMeans(Metric):
        name = "class_means"
        needs = frozenset(("images", "labels"))
        needs_reference = False

        def __init__(self):
            self.images, self.labels = [], []

        def update(self, batch):
            self.images.append(batch["images"])
            self.labels.append(batch["labels"])

        def compute(self, reference):
            images, labels = np.concatenate(self.images), np.concatenate(self.labels)
            return {f"mean_{c}": float(images[labels == c].mean()) for c in np.unique(labels)}

        def recipe(self, reference):
            return {"class_means": {"version": 1}}

    class Unlike:
        pass
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_metric.py").write_text(textwrap.dedent(OWN))
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "own_metric:ClassMeans"
    sys.modules.pop("own_metric", None)


def test_names_and_their_order():
    assert [kind.name for kind in METRICS.values()] == list(METRICS)
    assert set(DEFAULT) <= set(METRICS)
    assert [kind.name for kind in find_metrics(["kid", "fid", "kid"])] == ["fid", "kid"]
    with pytest.raises(
        EvaluationError, match=r"(?s)unknown metrics \['fld'\].*package.module:Class"
    ):
        find_metrics(["fld"])
    with pytest.raises(EvaluationError, match="no metrics are named"):
        find_metrics([])


def test_invalid_metrics_are_rejected(own):
    with pytest.raises(EvaluationError, match="'own_metric:Unlike' is not a metric"):
        find_metrics(["own_metric:Unlike"])
    with pytest.raises(ConfigError, match="'no_such_module' cannot be imported"):
        find_metrics(["no_such_module:Metric"])
    with pytest.raises(ConfigError, match="has no 'Other'"):
        find_metrics(["own_metric:Other"])


def score(tmp_path, names, labels=LABELS, report=None, **settings):
    given = {} if labels is None else {"labels": labels}
    np.savez(tmp_path / "samples.npz", IMAGES, **given)
    np.savez(tmp_path / "ref.npz", IMAGES[::-1])
    scorer = Scorer(StandIn(), open_reference(tmp_path / "ref.npz"), report)
    images = open_images(tmp_path / "samples.npz")
    return scorer.score(images, names, folder=tmp_path / "parts", **settings)


def test_a_metric_from_outside_the_package(tmp_path, own):
    found = score(tmp_path, [own, "fid"])
    want = {f"mean_{c}": IMAGES[LABELS == c].mean() for c in range(4)}
    assert {name: found.scores[name] for name in want} == pytest.approx(want)
    assert set(found.scores) == {"fid", *want} and found.recipe["class_means"] == {"version": 1}
    with pytest.raises(EvaluationError, match="class_means needs the class of every image"):
        score(tmp_path, [own], labels=None)


def test_it_is_restored_from_what_it_received(tmp_path, own):
    want = score(tmp_path, [own, "fid"]).scores

    class Killed(Exception):
        pass

    def stop(_):
        def report(done, total):
            if done == 24:
                raise Killed

        return report

    with pytest.raises(Killed):
        score(tmp_path, [own, "fid"], report=stop, save_every=16)
    assert (tmp_path / "parts" / "samples" / "images-00000016.npy").exists()
    assert score(tmp_path, [own, "fid"]).scores == want


def test_too_few_images_are_noticed_before_the_pass(tmp_path, monkeypatch):
    monkeypatch.setattr(StandIn, "__call__", None)
    np.savez(tmp_path / "samples.npz", IMAGES[:3])
    np.savez(tmp_path / "ref.npz", IMAGES[:2])
    scorer = Scorer(StandIn(), open_reference(tmp_path / "ref.npz"))
    images = open_images(tmp_path / "samples.npz")
    with pytest.raises(EvaluationError, match="pr needs at least 4 samples, there are 3"):
        scorer.score(images, ["pr"], folder=tmp_path / "parts")
    images = open_images(tmp_path / "ref.npz")
    with pytest.raises(EvaluationError, match="fid needs at least 2 samples, there are 1"):
        np.savez(tmp_path / "one.npz", IMAGES[:1])
        scorer.score(open_images(tmp_path / "one.npz"), ["fid"], folder=tmp_path / "parts")
