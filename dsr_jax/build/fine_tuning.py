"""Adapts converted weights to a model with other classes or another resolution.

Config keys: `train.init_labels`, `train.init_class_map` and `train.init_positions`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsr_jax.core.errors import ConfigError, ConversionError
from dsr_jax.core.rng import stream_key
from dsr_jax.core.trees import flatten_names, unflatten_names
from dsr_jax.core.typing import Params
from dsr_jax.models.denoiser import Denoiser
from dsr_jax.models.embeddings import LABEL_STD
from dsr_jax.models.resample import resample

LABELS = ("names", "extend", "reset", "unconditional")
"""Values of `train.init_labels` besides "", which requires the same classes."""


@dataclass(frozen=True)
class Adaptation:
    """Adaptation of a converted model's weights to the config's model.

    Attributes:
      labels: "" to leave the label table as it is, or one of LABELS: "names" keeps the rows of
        classes that both models name, "extend" keeps all rows and adds new ones, "reset" keeps only
        the null row, and "unconditional" makes the null row that of the single class. New rows are
        initialized as in a new model.
      resample_positions: Resamples position tables to the model's grid of patches.
      old_names: Class name by label of the converted model; empty if unknown.
      new_names: Class name by label of the training data; empty if unknown.
      seed: Seed of new rows.
    """

    labels: str = ""
    resample_positions: bool = False
    old_names: Sequence[str] = ()
    new_names: Sequence[str] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if self.labels not in ("", *LABELS):
            raise ConfigError(
                f"config.train.init_labels={self.labels!r} is unknown",
                f"choose from {', '.join(LABELS)}, or leave it empty for the same classes",
            )

    @property
    def adapted_sizes(self) -> set[str]:
        """Sizes that may differ between the two models."""
        labels = {"num_classes"} if self.labels else set()
        return labels | ({"input_size"} if self.resample_positions else set())

    def __call__(self, params: Params, model: Denoiser) -> Params:
        """Returns the parameters for `model`.

        Raises:
          ConfigError: If an option does not fit the classes, or the model has no such table.
        """
        flat: dict[str, Any] = dict(flatten_names(params))
        if self.labels:
            name = model.label_table
            if name not in flat:
                raise ConfigError(
                    f"config.train.init_labels={self.labels!r}, but {type(model).__name__} has no "
                    "parameter that its label_table names",
                    "leave it empty, or set label_table in the denoiser's class",
                )
            flat[name] = self._label_rows(np.asarray(flat[name]), model.num_classes)
        if self.resample_positions:
            for name in set(model.position_tables) & set(flat):
                flat[name] = _resample_table(np.asarray(flat[name]), model)
        return unflatten_names(flat)

    def _label_rows(self, table: np.ndarray, num_classes: int) -> np.ndarray:
        """Returns the new label table [K + 1, D] of an old one; the null row is the last."""
        old, null = table[:-1], table[-1:]
        shape = (num_classes, table.shape[1])
        key = stream_key(self.seed, "init_labels")
        rows = LABEL_STD * np.asarray(jax.random.normal(key, shape), table.dtype)
        if self.labels == "unconditional":
            if num_classes != 1:
                raise ConfigError(
                    f"config.train.init_labels='unconditional' with config.data.num_classes="
                    f"{num_classes}",
                    "set config.data.num_classes=1 and config.objective.label_dropout=0.0",
                )
            rows = null
        elif self.labels == "extend":
            if num_classes < len(old):
                raise ConfigError(
                    f"config.train.init_labels='extend' from {len(old)} to {num_classes} classes",
                    f"use names or reset, or config.data.num_classes={len(old)} or more",
                )
            rows = np.concatenate([old, rows[len(old) :]])
        elif self.labels == "names":
            for new, label in self._same_names(len(old), num_classes).items():
                rows[new] = old[label]
        return np.concatenate([rows, null])

    def _same_names(self, num_old: int, num_new: int) -> dict[int, int]:
        """Returns {new label: old label} of the classes that both models name."""
        for whose, names, count, remedy in (
            (
                "the converted model",
                self.old_names,
                num_old,
                "name them in a file with one class name per line, config.train.init_class_map",
            ),
            ("the training data", self.new_names, num_new, "use a data source with class names"),
        ):
            if not names or len(names) > count:
                raise ConfigError(
                    f"config.train.init_labels='names', but {whose} has {len(names)} class names "
                    f"for {count} classes",
                    f"{remedy}, or use {', '.join(x for x in LABELS if x != 'names')}",
                )
        labels = {name: label for label, name in enumerate(self.old_names)}
        found = {
            new: labels[name] for new, name in enumerate(self.new_names) if name and name in labels
        }
        if not found:
            raise ConfigError(
                "config.train.init_labels='names', but no class name is common: the converted "
                f"model has {', '.join(self.old_names[:4])}, ..., the training data "
                f"{', '.join(self.new_names[:4])}, ...",
                "use reset",
            )
        return found


def _resample_table(table: np.ndarray, model: Denoiser) -> np.ndarray:
    """Resamples a position table [1, N, D] to the model's grid."""
    old, new = math.isqrt(table.shape[1]), model.grid
    grid = jnp.asarray(table.reshape(old, old, -1))
    # The bicubic method that ViTs resample their tables with.
    return np.asarray(resample(grid, new, new, "bicubic")).reshape(1, new**2, -1)


def adaptation_hints(differing: Mapping[str, Any]) -> str:
    """Returns which keys would adapt the sizes that differ; empty if none would."""
    hints = []
    if "num_classes" in differing:
        hints.append(f"config.train.init_labels ({', '.join(LABELS)}) adapts the label table")
    if "input_size" in differing:
        hints.append("config.train.init_positions=resample adapts the position table")
    return "; ".join(hints)


def check_positions(value: str) -> bool:
    """Returns whether `config.train.init_positions` asks for resampling.

    Raises:
      ConfigError: If the value is unknown.
    """
    if value not in ("", "resample"):
        raise ConfigError(
            f"config.train.init_positions={value!r} is unknown",
            "use resample, or leave it empty for the same resolution",
        )
    return value == "resample"


def names_of_record(record: Mapping[str, Any]) -> list[str]:
    """Returns the class names that a converted folder records.

    Raises:
      ConversionError: If the record is damaged.
    """
    names = record.get("class_names", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConversionError("class_names of conversion.json is not a list of names", "remove it")
    return names
