"""Samples from the weights of a run or converted folder, into files with their recipe."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from dsr_jax import build
from dsr_jax.config import ConfigDict
from dsr_jax.core.prompts import IMAGE_SLOT
from dsr_jax.core.typing import Params, PyTree
from dsr_jax.data.classes import DataDescription
from dsr_jax.models.denoiser import Denoiser
from dsr_jax.models.text_to_image import TextToImage
from dsr_jax.parallel.axes import Constrain
from dsr_jax.parallel.device_memory import FreeBytes, free_bytes, smallest_of_processes
from dsr_jax.parallel.mesh import MeshShape, make_mesh
from dsr_jax.parallel.processes import log
from dsr_jax.runs.sampled_classes import class_notes
from dsr_jax.runs.scoring import check_writable
from dsr_jax.sampling.batch import AUTO, find_batch, fixed_batch, whole_batch
from dsr_jax.sampling.job import SampleBatchFn, SampleJob
from dsr_jax.sampling.sampler import ArraySampler
from dsr_jax.telemetry.progress import announce, announce_compile, announce_first_call
from dsr_jax.training.checkpoints import restore_params


class OpenedWeights(NamedTuple):
    """Weights of a run or converted folder with their compiled sampler.

    Attributes:
      model: The network.
      params: Its parameters.
      variables: Variables of its input space.
      sampler: Its sampler.
      sample: Samples one batch from its indices [B] and labels [B] or tokens [B, L].
      image_shape: Height, width and channels of the images.
      recipe: What decides the images, besides indices and labels.
      name: The weights in a file's name.
      mesh: The devices, over which a batch must divide.
    """

    model: Denoiser
    params: Params
    variables: PyTree
    sampler: ArraySampler
    sample: SampleBatchFn
    image_shape: tuple[int, ...]
    recipe: dict[str, Any]
    name: str
    mesh: Mesh

    @property
    def devices(self) -> int:
        """Number of devices."""
        return self.mesh.size


def open_weights(
    config: ConfigDict,
    folder: Path,
    *,
    converted: bool = False,
    checkpoint_step: int | None = None,
) -> OpenedWeights:
    """Restores the weights, and builds their sampler; the arguments are those of `save_samples`."""
    section = config.sample
    mesh, rules = make_mesh(MeshShape(**config.mesh.to_dict())), build.make_rules(config)
    space, variables = build.make_decoding_space(config, mesh)
    model = build.make_model(config, space, Constrain(rules, mesh))
    sampler = build.make_sampler(config, model, space, mesh, rules)
    sample = announce_first_call(sampler, "the sampler")
    abstract = build.abstract_params(model, space, mesh, rules)
    if converted:
        with announce(f"reading {folder}"):
            params, record = build.restore_converted(str(folder), model, abstract)
        recipe, name = build.sampling_recipe(config, None, None), "converted"
        recipe["converted"] = {key: record[key] for key in ("source", "source_digest", "entry")}
    else:
        ema = None if section.ema == "none" else section.ema
        with announce(f"reading {folder / 'checkpoints'}"):
            params, meta = restore_params(folder / "checkpoints", abstract, checkpoint_step, ema)
        recipe = build.sampling_recipe(config, meta["step"], section.ema)
        name = f"step{meta['step']:08d}-ema{section.ema}"
    latents = jax.ShapeDtypeStruct((1, *space.latent_shape), np.float32)
    return OpenedWeights(
        model,
        params,
        variables,
        sampler,
        lambda indices, labels: sample(params, variables, indices, labels),
        jax.eval_shape(space.decode, variables, latents).shape[1:],
        {"weights": build.weights_digest(params), **recipe},
        name,
        mesh,
    )


def save_samples(
    config: ConfigDict,
    labels: np.ndarray,
    folder: Path,
    *,
    converted: bool = False,
    checkpoint_step: int | None = None,
    out: str | None = None,
    name: str | None = None,
    data: DataDescription | None = None,
    prompts: Sequence[str] = (),
    free_memory: FreeBytes = free_bytes,
) -> Path:
    """Restores the weights and runs the job; returns the path of the `.npz`.

    Args:
      config: Config of the run or of the converted weights.
      labels: Class of every sample [N]; with text, the number of its prompt.
      folder: The run, or the converted folder, whose weights are taken.
      converted: Whether the folder contains converted weights instead of a run.
      checkpoint_step: Step of the run's checkpoint; None for the newest.
      out: Folder of the files; None for samples/ next to the weights.
      name: Name of the files; None makes one from the settings.
      data: The run's classes, whose names the record carries.
      prompts: The prompts of a model of text, which the record carries.
      free_memory: Memory that the sampler may allocate on each device.

    Raises:
      PromptError: Naming the prompt that cannot be encoded.
      EvaluationError: If nothing can be written into the folder.
      DeviceMemoryError: With config.sample.batch=-1, if not even one sample fits.
    """
    section = config.sample
    target = Path(out or folder / "samples").expanduser()
    check_writable(target)
    opened = open_weights(config, folder, converted=converted, checkpoint_step=checkpoint_step)
    model, params, recipe = opened.model, opened.params, dict(opened.recipe)
    notes = class_notes(data, labels.tolist())
    if isinstance(model, TextToImage):
        if section.text == "greedy":
            with announce("writing the answers"):
                tokens = build.write_answers(config, model, params, prompts)
        else:
            tokens = build.encode_prompts(config, prompts, model.num_slots)
        failed = int((~(tokens == IMAGE_SLOT).any(axis=1))[labels].sum())
        recipe |= {"text": section.text, "failures": failed}
        notes = {"prompts": list(prompts), "prompt_of_sample": labels.tolist()}
        labels = tokens[labels]
    method, kind = section.method.replace(":", "."), "ag" if section.autoguidance else "cfg"
    settings = f"{opened.name}-{method}{section.num_points}-{kind}{section.guidance:g}"
    job = SampleJob(
        target,
        name or f"{settings}-seed{section.seed}-n{section.num}",
        labels,
        opened.image_shape,
        recipe,
        notes,
    )
    log(f"sampling {section.num} images: {job.name}")
    return job.run(*_sampler_and_batch(section.batch, opened, job, free_memory), report=log)


def _sampler_and_batch(
    wanted: int, opened: OpenedWeights, job: SampleJob, free_memory: FreeBytes
) -> tuple[SampleBatchFn, int]:
    """Returns the function that samples one batch, and the batch, which decides no image.

    Args:
      wanted: config.sample.batch.
      opened: The weights.
      job: The job, whose earlier starts have recorded their batch.
      free_memory: Memory that the sampler may allocate on each device.
    """
    num, devices = len(job.labels), opened.devices
    weights = opened.params, opened.variables
    free = None
    if wanted == AUTO and not job.is_assembled():
        free = free_memory(list(opened.mesh.devices.flat))
        # If one process has no limit to go by, none has.
        free = smallest_of_processes(-1 if free is None else max(free, 0))
    if free is None or free < 0:
        return opened.sample, whole_batch(min(fixed_batch(wanted), num), devices)
    with announce_compile("the sampler"):
        choice = find_batch(
            lambda size: opened.sampler.compile(*weights, size, job.labels.shape[1:]),
            num,
            devices,
            free,
            job.last_batch(),
        )
    log(str(choice))
    call = opened.sampler.with_program(choice.program)
    return lambda indices, labels: call(*weights, indices, labels), choice.size
