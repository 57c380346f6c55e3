"""The metrics that can be named in --metrics and in `config.eval.metrics`."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from dsr_jax.core.errors import EvaluationError
from dsr_jax.core.plugins import is_reference, load_object
from dsr_jax.evaluation.frechet import FID, SFID, FDDINOv2
from dsr_jax.evaluation.inception_score import IS
from dsr_jax.evaluation.kid import KID
from dsr_jax.evaluation.metric import Metric
from dsr_jax.evaluation.precision_recall import PR

METRICS: Mapping[str, type[Metric]] = MappingProxyType(
    {metric.name: metric for metric in (FID, SFID, IS, PR, KID, FDDINOv2)}
)
"""Classes by name, in the order in which scores are reported."""

DEFAULT = ("fid", "sfid", "is", "pr")
"""Those of the ADM evaluator."""


def find_metrics(names: Iterable[str]) -> list[type[Metric]]:
    """Returns the classes of metrics, those of this package first and in their own order.

    Args:
      names: Keys of METRICS, or "package.module:Class" of subclasses of `Metric` elsewhere.

    Raises:
      EvaluationError: For an unknown name, or an object that is no metric.
      ConfigError: If a module or class cannot be imported.
    """
    wanted = list(dict.fromkeys(names))
    if unknown := [name for name in wanted if name not in METRICS and not is_reference(name)]:
        raise EvaluationError(
            f"unknown metrics {unknown}",
            f"choose from {', '.join(METRICS)}, or name your own as package.module:Class",
        )
    if not wanted:
        raise EvaluationError("no metrics are named", f"choose from {', '.join(METRICS)}")
    found = [METRICS[name] for name in METRICS if name in wanted]
    for name in wanted:
        if name in METRICS:
            continue
        loaded = load_object("metrics", name)
        if not (isinstance(loaded, type) and issubclass(loaded, Metric)):
            raise EvaluationError(
                f"{name!r} is not a metric", "name a subclass of dsr_jax.evaluation.metric.Metric"
            )
        found.append(loaded)
    return found
