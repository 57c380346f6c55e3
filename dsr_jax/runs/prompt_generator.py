"""A run's model as a generator of images from prompts and seeds, for benchmarks of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dsr_jax import build
from dsr_jax.config import ConfigDict
from dsr_jax.core.errors import ConfigError, NumericsError
from dsr_jax.models.text_to_image import TextToImage
from dsr_jax.parallel.shardings import fetch
from dsr_jax.runs.sampling import open_weights


class PromptGenerator:
    """Images of prompts by the weights of a run.

    The noise of an image follows from its seed and config.sample.seed, so that neither the batch
    nor the prompts beside it decide it.

    Args:
      config: Config of the run; `config.sample` decides solver, guidance and weights.
      folder: The run.
      checkpoint_step: Step of the run's checkpoint; None for the newest.

    Attributes:
      recipe: What decides the images, besides prompts and seeds.

    Raises:
      ConfigError: If the run's model takes no text.
    """

    def __init__(
        self, config: ConfigDict, folder: Path, checkpoint_step: int | None = None
    ) -> None:
        self._opened = open_weights(config, folder, checkpoint_step=checkpoint_step)
        if not isinstance(self._opened.model, TextToImage):
            raise ConfigError(
                f"{folder} is a run of classes, not of text", "name a run with config.language"
            )
        self._config, self._model = config, self._opened.model
        self.recipe = {**self._opened.recipe, "text": config.sample.text}

    def __call__(self, prompts: Sequence[str], seeds: np.ndarray) -> np.ndarray:
        """Returns the images of prompts, uint8 [B, H, W, 3]; black where an answer has none.

        Args:
          prompts: B prompts.
          seeds: Seeds [B], uint32.

        Raises:
          PromptError: Naming the prompt that cannot be encoded.
          NumericsError: If an image is not finite.
        """
        count, config = len(prompts), self._config
        # The batch must divide over the devices.
        padded = -(-count // self._opened.devices) * self._opened.devices
        rows = np.minimum(np.arange(padded), count - 1)
        if config.sample.text == "greedy":
            tokens = build.write_answers(config, self._model, self._opened.params, prompts)
        else:
            tokens = build.encode_prompts(config, prompts, self._model.num_slots)
        images, finite, _ = fetch(self._opened.sample(seeds[rows], tokens[rows]))
        if not finite[:count].all():
            wrong = prompts[int(np.flatnonzero(~finite[:count])[0])]
            raise NumericsError(
                f"the image of {wrong!r} is not finite",
                "sample with --config.precision.compute=float32, or from another checkpoint",
            )
        return images[:count]
