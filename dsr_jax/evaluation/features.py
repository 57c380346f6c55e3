"""Features of images by frozen networks on all devices of all hosts; source: spec evaluation 9."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dsr_jax.core.typing import Array, Params
from dsr_jax.evaluation.networks import FeatureNetwork
from dsr_jax.parallel.axes import make_rules
from dsr_jax.parallel.shardings import batch_sharding, host_to_global, process_rows, replicated
from dsr_jax.telemetry.progress import announce_first_call


class Extractor:
    """Frozen networks on all devices.

    Args:
      networks: The networks; no two have features of the same name.
      mesh: All devices; images are split over every axis.
      batch: Images at a time over all devices; rounded up to a multiple of their number.

    Attributes:
      batch: Images at a time.
      rows: Rows [n] of a batch that this process's devices hold.
      widths: Width of every feature.
    """

    def __init__(self, networks: Sequence[FeatureNetwork], mesh: Mesh, batch: int = 64) -> None:
        self.batch = -(-batch // mesh.size) * mesh.size
        self._sharding = batch_sharding(mesh, make_rules("replicated"))
        self.rows = process_rows(self._sharding, self.batch)
        self._networks = networks
        self._params = [jax.device_put(each.params, replicated(mesh)) for each in networks]
        self._compiled: dict[frozenset[str], Any] = {}
        image = jax.ShapeDtypeStruct((1, 32, 32, 3), np.uint8)
        self.widths: dict[str, int] = {}
        for each in networks:
            shapes = jax.eval_shape(each.apply, each.params, image)
            self.widths |= {name: x.shape[1] for name, x in shapes.items()}

    @property
    def records(self) -> list[dict[str, Any]]:
        """Returns what the networks' conversions recorded."""
        return [dict(each.record) for each in self._networks]

    def recipe(self, outputs: frozenset[str]) -> dict[str, Any]:
        """Returns what decides these features, besides the images."""
        used = (each.recipe for each in self._networks if each.outputs & outputs)
        return {key: value for recipe in used for key, value in recipe.items()}

    def __call__(
        self, images: np.ndarray, outputs: frozenset[str], first: int = 0
    ) -> dict[str, Array]:
        """Extracts features of a batch, of which each process gives the rows that it holds.

        Args:
          images: uint8 [n, H, W, C], this process's `rows` of the batch.
          outputs: Names in `widths`, and "images" for the images themselves.
          first: Index of the batch's first image.

        Returns:
          The global arrays asked for, by image in order; "min" and "max", the extreme values of
          each image; and "index", each image's own index, which went along with it.
        """
        if outputs not in self._compiled:
            program = jax.jit(lambda p, x: self._extract(p, x, outputs))
            names = ", ".join(sorted(outputs))
            self._compiled[outputs] = announce_first_call(program, f"the features ({names})")
        local = {"images": images, "index": (first + self.rows).astype(np.int32)}
        given = host_to_global(local, self._sharding, self.batch)
        return {**self._compiled[outputs](self._params, given["images"]), "index": given["index"]}

    def _extract(
        self, params: Sequence[Params], images: Array, outputs: frozenset[str]
    ) -> dict[str, Array]:
        found = {"min": images.min(axis=(1, 2, 3)), "max": images.max(axis=(1, 2, 3))}
        if "images" in outputs:
            found["images"] = images
        for network, given in zip(self._networks, params, strict=True):
            if wanted := network.outputs & outputs:
                features = network.apply(given, images)
                found |= {name: features[name] for name in wanted}
        return found
