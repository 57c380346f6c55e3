"""Makes a reference for python -m dsr_jax.evaluate from a data source or from a file of images.

    python tools/make_reference.py folder --root imagenet --split train --image-size 256 \\
        --inception converted/inception --keep 10000 --out imagenet256.npz
    python tools/make_reference.py VIRTUAL_imagenet256_labeled.npz --inception DIR --out ready.npz

The file contains moments of all images (`mu`, `sigma`, `mu_s`, `sigma_s`, with --dinov2 also
`mu_dinov2`, `sigma_dinov2`), --keep images taken evenly from the source (`arr_0`) with their
features, and the recipe. The ADM evaluator also reads it. An existing reference keeps its moments,
and the features of its images are added, which then need not be computed for every score. The same
command continues an interrupted one.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsr_jax.core.cli import make_parser, positive_int, run_main
from dsr_jax.core.errors import EvaluationError
from dsr_jax.core.provenance import git_revision, package_versions
from dsr_jax.data.sources import make_source
from dsr_jax.evaluation.features import Extractor
from dsr_jax.evaluation.frechet import FrechetMetric
from dsr_jax.evaluation.image_sets import ImageSet, SourceImages
from dsr_jax.evaluation.metric import Metric
from dsr_jax.evaluation.metrics import METRICS
from dsr_jax.evaluation.passes import forget, update_metrics
from dsr_jax.evaluation.precision_recall import PR
from dsr_jax.evaluation.reference import Gaussian, open_reference
from dsr_jax.models.inception_input import RESIZES
from dsr_jax.parallel.processes import is_process_zero
from dsr_jax.parallel.watch import join_job
from dsr_jax.runs.scoring import PassReport, make_extractor
from dsr_jax.sampling.npz import write_npz

_COPY = 256


def main(argv: Sequence[str] | None = None) -> None:
    """Makes the reference that the command line names; see the module's docstring."""
    args = _parser().parse_args(argv)
    out = Path(args.out)
    if out.exists():
        raise EvaluationError(f"{out} exists", "name a new file; nothing was written")
    make_reference(args, out)


@join_job()
def make_reference(args: argparse.Namespace, out: Path) -> None:
    """Makes the reference, on all processes."""
    extractor = make_extractor(args.inception, args.dinov2, args.batch, args.resize)
    maker = Maker(extractor, out, args.allow_constant)
    if Path(args.source).exists():
        maker.complete(Path(args.source))
    else:
        maker.from_source(args)


class Maker:
    """Extracts features and writes the reference file.

    Args:
      extractor: Feature networks.
      out: Path of the new file.
      allow_constant: Whether images of a single color are accepted.
    """

    def __init__(self, extractor: Extractor, out: Path, allow_constant: bool) -> None:
        self._extractor, self._out = extractor, out
        self._allow_constant = allow_constant
        self._kinds = [
            kind
            for kind in METRICS.values()
            if issubclass(kind, FrechetMetric) and kind.needs <= set(extractor.widths)
        ]
        self._recipe = extractor.recipe(frozenset(kind.feature for kind in self._kinds))
        self._folder = out.with_name(f"{out.name}.parts")

    def from_source(self, args: argparse.Namespace) -> None:
        """Makes a reference from all images of a data source.

        Raises:
          DataError: If the source cannot be read.
        """
        source = make_source(
            args.source,
            image_size=args.image_size,
            channels=args.channels,
            root=args.root,
            split=args.split,
            num_classes=args.classes,
        )
        images = SourceImages(source)
        moments = [kind() for kind in self._kinds]
        self._update(images, moments, "moments")
        arrays: dict[str, np.ndarray] = {}
        if is_process_zero():
            for metric in moments:
                arrays |= _named(metric, metric.gaussian())
        kept = SourceImages(source, min(args.keep, len(source))) if args.keep else None
        recipe = {
            **images.describe(),
            "split": args.split,
            "preprocessing": f"{source.name} {args.split}, centre crop to {args.image_size}",
            "size": list(images.shape[1:3]),
        }
        self._write(kept, arrays, images.shape[0], recipe)

    def complete(self, path: Path) -> None:
        """Makes a reference from an existing one or a file of images, by adding what it lacks.

        Raises:
          EvaluationError: If the file has no images, or moments of other weights.
        """
        given = open_reference(path)
        recorded = given.recipe or {}
        for key, ours in self._recipe.items():
            if recorded.get(key, ours) != ours:
                raise EvaluationError(
                    f"{path} was made with other {key}: {recorded[key]!r} instead of {ours!r}",
                    "give the weights and options that it was made with",
                )
        if given.images is None:
            raise EvaluationError(
                f"{path} has no images, so that features cannot be added",
                "use it as it is, or name a data source or a file with images (arr_0)",
            )
        arrays: dict[str, np.ndarray] = {}
        count = given.images.shape[0]
        # The file's own moments may be those of many more images than it contains.
        missing = [] if given.statistics else [kind() for kind in self._kinds]
        if missing:
            self._update(given.images, missing, "moments")
        for keys, gaussian in given.statistics.items():
            count = gaussian.count
            arrays |= dict(zip(keys, (gaussian.mean, gaussian.cov), strict=True))
        if is_process_zero():
            for metric in missing:
                arrays |= _named(metric, metric.gaussian())
        recipe = {
            "source": path.name,
            "digest": given.digest(),
            **(given.recipe or {}),
            "size": list(given.images.shape[1:3]),
        }
        self._write(given.images, arrays, count, recipe)

    def _update(self, images: ImageSet, metrics: Sequence[Metric], name: str) -> None:
        update_metrics(
            images,
            self._extractor,
            metrics,
            folder=self._folder / name,
            identity={"images": images.describe()},
            allow_constant=self._allow_constant,
            report=PassReport(name if name == "features" else f"features for {name}"),
        )

    def _write(
        self,
        kept: ImageSet | None,
        arrays: dict[str, np.ndarray],
        count: int,
        recipe: dict[str, Any],
    ) -> None:
        extra = {**arrays}
        if kept is not None:
            features = PR()
            self._update(kept, [features], "features")
            extra["features"] = features.features()
        if not is_process_zero():
            return
        if count:
            extra["num_images"] = np.asarray(count)
        # Without time and machine, so that the same images and weights give the same file.
        code = {"git_revision": git_revision(), "packages": package_versions()}
        extra["recipe"] = np.asarray(json.dumps({**recipe, **self._recipe, **code}))
        if kept is None:
            write_npz(self._out, None, (), extra)
        else:
            write_npz(self._out, kept.shape, kept.batches(_COPY), extra)
        forget(self._folder)
        print(f"{count or 'unknown number of'} images in the moments: {self._out}")


def _named(metric: FrechetMetric, gaussian: Gaussian) -> dict[str, np.ndarray]:
    """Returns a metric's moments under the names that reference files give them."""
    return dict(zip(metric.keys, (gaussian.mean, gaussian.cov), strict=True))


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("source", help="data source (digits, synthetic, folder, arrayrecord, tfds:NAME) or file")
    add("--root", help="folder of the data source")
    add("--split", default="train", help="split of the data source")
    add("--image-size", type=positive_int, default=256, help="side in pixels")
    add("--channels", type=positive_int, default=3, help="1 for grayscale, 3 for RGB")
    add("--classes", type=int, help="number of classes, for sources that do not record it")
    add("--inception", required=True, help="folder of converted weights")
    add("--dinov2", help="folder of a converted DINOv2 with its class output, for fd_dinov2")
    add("--keep", type=int, default=10_000, help="images to keep for precision, recall and KID")
    add("--batch", type=positive_int, default=64, help="images per step, over all devices")
    add("--resize", default="adm", choices=RESIZES, help="how images are resized to 299 pixels")
    add("--allow-constant", action="store_true", help="accept images of a single color")
    add("--out", required=True, help="new .npz")
    return parser


if __name__ == "__main__":
    run_main(main)
