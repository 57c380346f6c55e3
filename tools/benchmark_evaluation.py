"""Evaluation for `tools/benchmark.py`: Inception on both sides, and scores of given features."""

import copy
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dsr_jax.convert.inception import inception_rules, infer_inception
from dsr_jax.convert.rules import torch_to_flax
from dsr_jax.evaluation.features import Extractor
from dsr_jax.evaluation.frechet import frechet_distance, gaussian_moments
from dsr_jax.evaluation.networks import inception_features
from dsr_jax.evaluation.precision_recall import precision_recall
from dsr_jax.evaluation.reference import Gaussian
from dsr_jax.parallel.mesh import MeshShape, make_mesh
from tools.benchmark_sides import require_close

WIDTH = 2048
_POOL = frozenset(["pool"])


class InceptionSides:
    """Randomly initialized Inception as a JAX and as a PyTorch program.

    Both read the same uint8 images in the layout that each prefers, and resize as pytorch-fid does.

    Args:
      batch: Number of images.
      size: Height and width of the images.
    """

    def __init__(self, batch: int, size: int = 256) -> None:
        from tools.inception_reference import random_inception

        self._torch = random_inception()
        state = {name: value.numpy() for name, value in self._torch.state_dict().items()}
        network = infer_inception(state)
        params = torch_to_flax(state, inception_rules(network))
        mesh = make_mesh(MeshShape(), jax.devices()[:1])
        features = inception_features(network, params, resize="pytorch_fid")
        self._extract = Extractor([features], mesh, batch)
        shape = (batch, size, size, 3)
        self._images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)

    def ours(self) -> np.ndarray:
        """Returns our pooled features [B, 2048]."""
        return np.asarray(self._extract(self._images, _POOL)["pool"])

    def torch(self, channels_last: bool = False) -> Callable[[], Any]:
        """Returns a function that computes PyTorch's features.

        Args:
          channels_last: Whether images and kernels have our layout, which the public ports do not
            use.
        """
        import torch

        network, images = copy.deepcopy(self._torch), torch.from_numpy(self._images)
        images = images.permute(0, 3, 1, 2)
        if channels_last:
            network = network.to(memory_format=torch.channels_last)
        else:
            images = images.contiguous()

        def extract() -> Any:
            with torch.no_grad():
                return network(images)

        return extract

    def check(self) -> None:
        """Checks that our features agree with PyTorch's.

        Raises:
          NumericsError: If they differ.
        """
        require_close("output", "features", self.ours(), self.torch()())


def make_frechet(count: int, width: int = WIDTH) -> Callable[[], float]:
    """Returns a function that computes FID from features of `count` samples and given moments."""
    features, reference = _features(count, width, 0), gaussian_moments(_features(width, width, 1))

    def score() -> float:
        ours: Gaussian = gaussian_moments(features)
        return frechet_distance(ours.mean, ours.cov, reference.mean, reference.cov)

    return score


def make_precision_recall(count: int, width: int = WIDTH) -> Callable[[], Any]:
    """Returns a function that computes precision and recall from `count` features of each kind."""
    samples, reference = _features(count, width, 0), _features(count, width, 1)
    return lambda: precision_recall(samples, reference)


def peak_of_precision_recall(count: int, width: int = WIDTH) -> int:
    """Returns the peak memory in bytes of precision and recall, without their inputs.

    Measured in a separate process, since a process rarely returns freed memory. Memory of the
    program and of its compilation is included.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_peak, args=(theirs, count, width))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"the process that computes precision and recall failed: {process}")
    return int(ours.recv())


def _peak(result: Any, count: int, width: int) -> None:
    jax.config.update("jax_platforms", "cpu")
    score = make_precision_recall(count, width)
    before = _memory("VmRSS")
    score()
    # getrusage would start from the parent process's peak.
    result.send(_memory("VmHWM") - before)


def _memory(key: str) -> int:
    """Returns a line of /proc/self/status in bytes: current (VmRSS) or peak memory (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def _features(count: int, width: int, seed: int) -> np.ndarray:
    """Returns float32 features [N, D], positive and of unequal variance like Inception's."""
    random = np.random.default_rng(seed)
    scale = (1 / np.arange(1, width + 1)).astype(np.float32)
    features = random.standard_normal((count, width), np.float32)
    np.abs(features, out=features)
    features *= scale
    return features
