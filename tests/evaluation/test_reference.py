"""References that cannot be compared with are refused, with what is wrong in which file."""

import numpy as np
import pytest

from dsr_jax.core.errors import EvaluationError
from dsr_jax.evaluation.reference import open_reference

MOMENTS = {"mu": np.arange(3.0), "sigma": np.eye(3)}


def test_moments_count_and_recipe_are_read(tmp_path):
    path = tmp_path / "ref.npz"
    np.savez(path, **MOMENTS, num_images=np.int64(7), recipe='{"resize": "adm"}')
    found = open_reference(path)
    assert found.statistics["mu", "sigma"].count == 7
    assert found.recipe == {"resize": "adm"}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"mu": np.full(3, np.nan)}, "mu .* is not finite"),
        ({"mu": np.arange(3)}, "mu .* is int64"),
        ({"sigma": np.eye(4)}, r"shapes \(3,\) and \(4, 4\)"),
        ({"sigma": -np.eye(3)}, "sigma .* is no covariance"),
        ({"sigma": np.triu(np.ones((3, 3)))}, "sigma .* is no covariance"),
        ({"num_images": np.arange(3)}, r"num_images .* is int64\(3,\)"),
        ({"num_images": "many"}, "num_images .*, expected one whole number"),
        ({"recipe": "{"}, "recipe .* is no JSON"),
        ({"recipe": "[1]"}, "recipe .* is no object"),
    ],
)
def test_damaged_references_are_refused(tmp_path, changed, message):
    path = tmp_path / "ref.npz"
    np.savez(path, **{**MOMENTS, **changed})
    with pytest.raises(EvaluationError, match=message) as caught:
        open_reference(path)
    assert str(path) in str(caught.value) and caught.value.remedy
