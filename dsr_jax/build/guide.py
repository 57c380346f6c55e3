"""Reads the weaker denoiser of autoguidance, from a run or a converted folder.

Source: RAE and DSR, guidance method "autoguidance"; spec denoiser 1.14 and 2.5.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from dsr_jax.build.denoiser import make_model, restore_converted
from dsr_jax.build.state import abstract_params
from dsr_jax.config import ConfigDict, load_run
from dsr_jax.convert.files import read_conversion
from dsr_jax.core.errors import ConfigError
from dsr_jax.core.typing import Params
from dsr_jax.models.denoiser import Denoiser
from dsr_jax.models.precision import Precision
from dsr_jax.models.registry import DENOISERS, denoiser_class, is_denoiser
from dsr_jax.parallel.axes import Constrain, Rules
from dsr_jax.spaces import InputSpace
from dsr_jax.training.checkpoints import checksums, read_meta, restore_params

_SAME = ("path", "prediction", "noise_scale")
"""Keys of config.objective in which a guide may not differ, since outputs are mixed."""


@dataclass(frozen=True)
class Guide:
    """Guide whose weights are not read yet.

    Attributes:
      folder: Folder of a run or of a converted denoiser.
      model: The network.
      abstract: Shapes and shardings of its parameters.
      ema: EMA decay that a run samples with, "none" for the parameters; None for a
        converted folder.
    """

    folder: Path
    model: Denoiser
    abstract: Params
    ema: str | None

    def restore(self) -> Params:
        """Reads the weights onto the devices.

        Raises:
          CheckpointError: If the run has no checkpoint, or a damaged one.
          ConversionError: If the converted folder is damaged.
        """
        if self.ema is None:
            return restore_converted(str(self.folder), self.model, self.abstract)[0]
        ema = None if self.ema == "none" else self.ema
        return restore_params(self.folder / "checkpoints", self.abstract, None, ema)[0]


def find_guide(config: ConfigDict, space: InputSpace, mesh: Mesh, rules: Rules) -> Guide | None:
    """Returns the guide that config.sample.autoguidance names; None where it names none.

    Raises:
      ConfigError: If there is no denoiser, or one that predicts something else.
    """
    if not config.sample.autoguidance:
        return None
    folder = Path(config.sample.autoguidance)
    if (folder / "conversion.json").is_file():
        model, ema = _converted_model(config, folder, Constrain(rules, mesh)), None
    elif (folder / "config.json").is_file():
        own = load_run(folder)
        _check_objective(config, own, folder)
        model, ema = make_model(own, space, Constrain(rules, mesh)), own.sample.ema
    else:
        raise ConfigError(
            f"config.sample.autoguidance={str(folder)!r} holds neither a run nor a converted model",
            "name the folder of a run of python -m dsr_jax.train, or one that python -m "
            "dsr_jax.convert wrote",
        )
    _check_sizes(config, model, space, folder)
    return Guide(folder, model, abstract_params(model, space, mesh, rules), ema)


def guide_recipe(config: ConfigDict) -> dict[str, Any] | None:
    """Returns what identifies the guide's weights in a recipe; None without autoguidance.

    Raises:
      CheckpointError: If the run has no checkpoint.
    """
    if not config.sample.autoguidance:
        return None
    folder = Path(config.sample.autoguidance)
    if (folder / "conversion.json").is_file():
        return {"params_digest": read_conversion(folder)["params_digest"]}
    ema = load_run(folder).sample.ema
    meta = read_meta(folder / "checkpoints")
    prefix = "params/" if ema == "none" else f"ema/{ema}/"
    sums = {
        name.removeprefix(prefix): array["checksum"]
        for name, array in meta["arrays"].items()
        if name.startswith(prefix)
    }
    return {"step": meta["step"], "ema": ema, "weights": _digest(sums)}


def weights_digest(params: Params) -> str:
    """Returns a digest of the weights, whichever checkpoint or file they came from."""
    return _digest(checksums(params))


def _digest(sums: Mapping[str, Any]) -> str:
    return "sha256:" + hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()


def _converted_model(config: ConfigDict, folder: Path, constrain: Constrain) -> Denoiser:
    record = read_conversion(folder)
    if not is_denoiser(record["family"]):
        raise ConfigError(
            f"config.sample.autoguidance={str(folder)!r} holds a {record['family']}, no denoiser",
            f"name a folder of one of {', '.join(DENOISERS)}",
        )
    precision = Precision(config.precision.compute, config.precision.residual)
    kind = denoiser_class(record["family"])
    return kind(**record["model"], precision=precision, constrain=constrain)


def _check_objective(config: ConfigDict, own: ConfigDict, folder: Path) -> None:
    differing = [
        f"config.objective.{key}: {own.objective[key]} -> {config.objective[key]}"
        for key in _SAME
        if own.objective[key] != config.objective[key]
    ]
    if differing:
        raise ConfigError(
            f"the guide {folder} was trained for something else (guide -> config):\n    "
            + "\n    ".join(differing),
            "name a guide that was trained with the same objective",
        )


def _check_sizes(config: ConfigDict, model: Denoiser, space: InputSpace, folder: Path) -> None:
    side, _, channels = space.latent_shape
    found = (model.input_size, model.in_channels, model.num_classes)
    wanted = (side, channels, config.data.num_classes)
    if found != wanted:
        raise ConfigError(
            f"the guide {folder} has side, channels and classes {found}, the config {wanted}",
            "name a guide for the same latents and classes",
        )
