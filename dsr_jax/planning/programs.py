"""Ahead-of-time (AOT) programs: compiles a config without its devices, and reports on it."""

import contextlib
import importlib.metadata
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dsr_jax import build
from dsr_jax.build.abstract import abstract_batch, abstract_space
from dsr_jax.config import ConfigDict, has_text
from dsr_jax.core.provenance import git_revision
from dsr_jax.core.typing import PyTree
from dsr_jax.parallel import shardings
from dsr_jax.parallel.axes import Constrain
from dsr_jax.parallel.device_memory import RESERVE
from dsr_jax.parallel.gpus import CUDA_VERSIONS, GpuTopology
from dsr_jax.parallel.topologies import AnyTopology, compile_only_devices
from dsr_jax.planning.hlo import parse
from dsr_jax.planning.memory import (
    GIB,
    TEMPORARIES,
    Layout,
    advice,
    bytes_per_chip,
    gpu_advice,
    memory_parts,
    out_of_memory,
)
from dsr_jax.planning.program_cost import split_program
from dsr_jax.planning.report import Compiled, Report, make_report
from dsr_jax.telemetry import flops


@dataclass(frozen=True)
class AotProgram:
    """Program that can be compiled without its devices.

    Attributes:
      what: Name of the program.
      lower: Function that traces and lowers it.
      arguments: Abstract arguments, by purpose.
      images: Number of images per call, over all chips.
      steps: Number of calls in the whole job.
      model_flops: Model FLOPs per call, as counted for MFU; None if unknown.
      layout: Quantities that determine its memory.
    """

    what: str
    lower: Callable[[], Any]
    arguments: Mapping[str, PyTree]
    images: int
    steps: int
    model_flops: float | None
    layout: Layout


def train_step(config: ConfigDict, mesh: Mesh, slices: tuple[str, ...] = ()) -> AotProgram:
    """Returns the training step of `python -m dsr_jax.train`.

    Args:
      config: Experiment config.
      mesh: Compile-only devices.
      slices: Names of larger topologies, for the advice.
    """
    rules = build.make_rules(config)
    space, variables = abstract_space(config, mesh)
    model = build.make_model(config, space, Constrain(rules, mesh))
    optimizer = build.make_optimizer(config)
    abstract, _ = build.make_state(config, model, space, optimizer, mesh, rules)
    sharding = shardings.batch_sharding(mesh, rules)
    batch = abstract_batch(config, space, sharding)
    step = build.jit_step(
        build.skip_batches(config, build.make_step(config, model, space, optimizer, abstract)),
        abstract,
        sharding,
        mesh,
        build.xla_options(config),
    )
    lowerable: Any = step
    images = config.data.global_batch
    state = {"parameters": abstract.params, "optimizer": abstract.opt_state, "EMA": abstract.ema}
    return AotProgram(
        "training step",
        lambda: lowerable.lower(abstract, batch, variables),
        {**state, "frozen networks": variables, "batch": batch},
        images,
        config.train.steps,
        flops.train_step_flops(model.forward_flops(), images),
        Layout(
            mesh=dict(mesh.shape),
            width=config.model.hidden_size,
            remat=getattr(model, "remat", "full"),
            batch_per_chip=images / mesh.size,
            accumulate=config.optim.accumulate,
            state_bytes=bytes_per_chip(state),
            slices=slices,
        ),
    )


def sampler(config: ConfigDict, mesh: Mesh, slices: tuple[str, ...] = ()) -> AotProgram:
    """Returns the program of `python -m dsr_jax.sample` for one batch; Args as in `train_step`."""
    rules = build.make_rules(config)
    space, variables = abstract_space(config, mesh)
    model = build.make_model(config, space, Constrain(rules, mesh))
    params = build.abstract_params(model, space, mesh, rules)
    sharding = shardings.batch_sharding(mesh, rules)
    guide = build.find_guide(config, space, mesh, rules)
    sample: Any = build.compile_sampler(config, model, space, sharding, guide)
    guide_params = guide.abstract if guide else None
    weights = {"parameters": params} | ({"guide": guide_params} if guide else {})
    images = build.sampling_batch(config, mesh.size)
    text = (config.language.max_length,) if has_text(config) else ()
    indices = jax.ShapeDtypeStruct((images,), jnp.uint32, sharding=sharding)
    labels = jax.ShapeDtypeStruct((images, *text), jnp.int32, sharding=sharding)
    return AotProgram(
        "sampler",
        lambda: sample.lower(params, guide_params, variables, indices, labels),
        {**weights, "frozen networks": variables},
        images,
        -(-config.eval.num_samples // images) or 1,
        None,
        Layout(
            mesh=dict(mesh.shape),
            width=config.model.hidden_size,
            remat="full",  # There is no backward pass to save activations for.
            batch_per_chip=images / mesh.size,
            accumulate=0,
            state_bytes=bytes_per_chip(weights),
            slices=slices,
        ),
    )


PROGRAMS: Mapping[str, Callable[[ConfigDict, Mesh, tuple[str, ...]], AotProgram]] = {
    "train": train_step,
    "sampler": sampler,
}


def compile_report(
    config: ConfigDict,
    topology: AnyTopology,
    program: str,
    subject: Mapping[str, Any],
    keep_text: Callable[[str], None] = lambda text: None,
) -> Report:
    """Compiles one program of a config and returns its report, even if it does not fit.

    Args:
      config: Experiment config.
      topology: Chips to compile for.
      program: Key of PROGRAMS.
      subject: First fields of the report: the config's name and the command.
      keep_text: Function that stores the text of the compiled program.

    Raises:
      DsrError: If the compiler is not installed, or the config does not fit the mesh.
    """
    mesh = build.make_mesh(config, compile_only_devices(topology))
    refused: list[str] = []
    candidates = build.policy_configs(config) if program == "train" else [config]
    # As in a run: `build.fitting` chooses with a reserve, and takes a named policy as it is.
    reserve = RESERVE if len(candidates) > 1 else 0.0
    for candidate in candidates:
        aot = PROGRAMS[program](candidate, mesh, topology.larger)
        compiled = _compile(aot, mesh, topology, keep_text, reserve)
        if compiled.fits:
            break
        refused.append(f"{candidate.model.remat} needs {compiled.needed / GIB:.2f} GiB")
    remat = candidate.model.remat
    if config.model.remat != remat and refused:
        remat += f" (auto: {', '.join(refused)})"
    about = {
        "what": aot.what,
        **subject,
        "mesh": " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items()),
        "remat": remat,
        "global_batch": aot.images,
        "versions": _versions(topology.platform),
        "git_revision": git_revision(),
    }
    return make_report(
        about,
        topology,
        compiled,
        images=aot.images,
        steps=aot.steps,
        model_flops=aot.model_flops,
    )


def _versions(platform: str) -> dict[str, str]:
    """Returns the versions of JAX and of the compiler's packages."""
    if platform == "tpu":
        names: tuple[str, ...] = ("jax", "libtpu")
    else:
        names = ("jax", *(f"jax-cuda{n}-pjrt" for n in CUDA_VERSIONS), "nvidia-cudnn-cu13")
    found = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _compile(
    program: AotProgram,
    mesh: Mesh,
    topology: AnyTopology,
    keep_text: Callable[[str], None],
    reserve: float,
) -> Compiled:
    """Compiles a program of which the run would leave a fraction of the memory unused."""
    arguments = {name: bytes_per_chip(tree) for name, tree in program.arguments.items()}
    limit, start = int(topology.chip.hbm_bytes), time.monotonic()
    try:
        # Tracing chooses kernels by the mesh's platform, not by this process's.
        with jax.set_mesh(mesh):
            lowered = program.lower()
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        refused = out_of_memory(str(error), sum(arguments.values()))
        if refused is None:
            raise
        needed, limit = refused
        memory = {**arguments, TEMPORARIES: needed - sum(arguments.values())}
        seconds = time.monotonic() - start
        hints = _hints(program, topology, memory, needed, limit)
        return Compiled(memory, needed, limit, seconds, advice=hints)
    seconds = time.monotonic() - start
    memory = memory_parts(compiled.memory_analysis(), arguments)
    needed = sum(memory.values())
    unused = math.ceil(reserve * limit)
    usable = limit - unused
    hints = [] if needed <= usable else _hints(program, topology, memory, needed, usable)
    text = compiled.as_text()
    keep_text(text)
    gpus = topology.gpus if isinstance(topology, GpuTopology) else 0
    parts = split_program(parse(text, topology.slices, gpus))
    return Compiled(memory, needed, limit, seconds, parts, hints, unused)


def _hints(
    program: AotProgram,
    topology: AnyTopology,
    memory: Mapping[str, int],
    needed: int,
    limit: int,
) -> list[str]:
    first = gpu_advice(topology.chip, needed) if isinstance(topology, GpuTopology) else []
    return [*first, *advice(program.layout, needed, limit, memory.get(TEMPORARIES, 0))]
