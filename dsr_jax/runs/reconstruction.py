"""Reconstructions of images by an autoencoder, and rFID."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsr_jax import build
from dsr_jax.build.rae import file_digests
from dsr_jax.config import ConfigDict, base_config, precision_recipe, to_json
from dsr_jax.core.errors import ConfigError
from dsr_jax.evaluation.features import Extractor
from dsr_jax.evaluation.frechet import FID
from dsr_jax.evaluation.image_sets import ImageSet, SourceImages
from dsr_jax.evaluation.passes import update_metrics
from dsr_jax.parallel import shardings
from dsr_jax.parallel.processes import is_process_zero, log
from dsr_jax.runs.scoring import PassReport
from dsr_jax.sampling.images import to_uint8
from dsr_jax.sampling.job import SampleJob, Samples
from dsr_jax.telemetry.progress import announce_first_call

_LEFT_OUT = (
    *("shift", "eps", "num_registers", "register_scale"),
    *("normal_values", "shared_maximum", "spare_first_token"),
)
"""Settings that a recipe leaves out where they have their default, as recipes always did."""


class Reconstruction:
    """Reconstruction of a data source's images by an autoencoder.

    Args:
      config: Space and data.
      images: Number of images, taken at even intervals; 0 for all.
      batch: Images at a time over all devices.

    Attributes:
      mesh: Mesh of devices.
      images: Images to reconstruct.
      recipe: Settings that determine the reconstructions.

    Raises:
      ConfigError: If the autoencoder has no decoder, or gives images of another size.
    """

    def __init__(self, config: ConfigDict, images: int, batch: int) -> None:
        self.mesh, rules = build.make_mesh(config), build.make_rules(config)
        space, self._variables = build.make_space(config, self.mesh)
        source = build.make_source(config)
        self.images = SourceImages(source, images)
        self._sharding = shardings.batch_sharding(self.mesh, rules)
        self._batch = batch
        rounding = config.sample.uint8

        def reconstruct(variables: Any, images: jax.Array, index: jax.Array) -> Samples:
            latents = space.encode(variables, images.astype(jnp.float32) / 255)
            decoded = space.decode(variables, latents)
            finite = jnp.isfinite(decoded).all(axis=(1, 2, 3))
            return Samples(to_uint8(decoded, rounding), finite, index)

        program = jax.jit(reconstruct, out_shardings=self._sharding)
        self._reconstruct = announce_first_call(program, "the autoencoder")
        given = jax.ShapeDtypeStruct((batch, *self.images.shape[1:]), np.uint8)
        index = jax.ShapeDtypeStruct((batch,), np.uint32)
        shape = jax.eval_shape(reconstruct, self._variables, given, index).images.shape[1:]
        if shape != self.images.shape[1:]:
            raise ConfigError(
                f"the autoencoder makes images {shape} of images {self.images.shape[1:]}",
                "set config.data.image_size to what its decoder makes",
            )
        self.recipe: dict[str, Any] = {
            "data": {
                **self.images.describe(),
                "split": config.data.split,
                "image_size": config.data.image_size,
            },
            "space": space_recipe(config),
            "precision": precision_recipe(config, trained=False),
            "rounding": rounding,
        }

    def run(self, out: Path) -> Path:
        """Reconstructs what is missing; returns the path of the `.npz`.

        Its labels are the images' indices.
        """
        numbers = np.arange(self.images.shape[0], dtype=np.int32)
        shape = self.images.shape[1:]
        job = SampleJob(out, "reconstructions", numbers, shape, self.recipe)
        rows = shardings.process_rows(self._sharding, self._batch)

        def reconstruct_rows(indices: np.ndarray, _: np.ndarray) -> Samples:
            given = {"images": self.images.take(indices[rows]), "index": indices[rows]}
            batch = shardings.host_to_global(given, self._sharding, self._batch)
            return self._reconstruct(self._variables, batch["images"], batch["index"])

        return job.run(reconstruct_rows, self._batch, report=log)


def space_recipe(config: ConfigDict) -> dict[str, Any]:
    """Returns the settings and file digests that determine an autoencoder's reconstructions."""
    values, defaults = (to_json(each)["space"] for each in (config, base_config()))
    changed = {key: values[key] for key in _LEFT_OUT if values[key] != defaults[key]}
    settings = {key: values[key] for key in ("name", "image_size", "preln", "scale")}
    return {**settings, **changed, **file_digests(config)}


def rfid(
    images: ImageSet, outputs: ImageSet, extractor: Extractor, recipe: dict[str, Any], out: Path
) -> float:
    """Returns the Frechet distance between Inception features of reconstructions and images.

    Returns:
      The distance; NaN on processes other than 0.

    Raises:
      EvaluationError: If features are not finite, or there are fewer than two images.
    """
    ours, theirs = FID(), FID()
    for name, each, metric in (("reconstructions", outputs, ours), ("images", images, theirs)):
        update_metrics(
            each,
            extractor,
            [metric],
            folder=out / "rfid.parts" / name,
            identity={"images": each.describe(), "recipe": recipe},
            # An image of a single color is reconstructed like any other.
            allow_constant=True,
            report=PassReport(f"features of {name}"),
        )
    return ours.compute(theirs)["fid"] if is_process_zero() else float("nan")
