"""Choice of what the backward pass recomputes, by the memory of the devices."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from dsr_jax.build.experiment import jit_step, skip_batches, xla_options
from dsr_jax.build.remat import remat_policies
from dsr_jax.config import ConfigDict, trains_decoder
from dsr_jax.core.errors import DeviceMemoryError
from dsr_jax.core.typing import PyTree
from dsr_jax.parallel.device_memory import (
    GIB,
    RESERVE,
    FreeBytes,
    allocated_bytes,
    bytes_per_chip,
    free_bytes,
    is_out_of_memory,
    out_of_memory,
    smallest_of_processes,
)
from dsr_jax.parallel.gpus import CARDS, MAX_FRACTION, memory_fraction
from dsr_jax.parallel.processes import log
from dsr_jax.training.state import TrainState


@dataclass(frozen=True)
class Fit:
    """Memory that the step needs with one policy.

    Attributes:
      policy: Name of the policy.
      arguments: Bytes of its arguments on one device: state, frozen networks and batch.
      allocated: Bytes that it allocates beside them; None if compiler or device refused it
        without a number.
    """

    policy: str
    arguments: int
    allocated: int | None

    def __str__(self) -> str:
        if self.allocated is None:
            return f"{self.policy} is out of memory"
        return f"{self.policy} needs {gib(self.arguments + self.allocated)}"


@dataclass(frozen=True)
class RematChoice:
    """Result of a choice.

    Attributes:
      policy: The policy that the run uses.
      free: Bytes that the step may allocate on a device beside its arguments; None if unknown.
      fits: What was compiled, in order; empty if nothing had to be.
    """

    policy: str
    free: int | None
    fits: tuple[Fit, ...] = ()

    def __str__(self) -> str:
        available = gib(self.fits[-1].arguments + (self.free or 0))
        return (
            f"remat: {'; '.join(map(str, self.fits))}, of {available} that the step can have of "
            f"each device; {self.policy} is used"
        )

    def to_json(self) -> dict[str, Any]:
        """Returns the choice for provenance.json."""
        return {
            "policy": self.policy,
            "free_bytes": self.free,
            "compiled": [
                {
                    "policy": fit.policy,
                    "argument_bytes": fit.arguments,
                    "allocated_bytes": fit.allocated,
                }
                for fit in self.fits
            ],
        }


class FittingStep:
    """A training step that takes the fastest policy with which it fits into memory.

    Its first call compiles the step for one policy after the other, with the shapes and the
    devices that it then runs on, and runs the first program that fits. All processes make the same
    choice. A config that names a policy, and devices without a known limit, leave no choice:
    nothing is compiled more than once.

    Args:
      steps: The jitted step by policy, the fastest first.
      mesh: Devices that it runs on.
      remedies: `remedies(fit, free)` returns what to change if even the last policy does not fit.
      note: Receives the choice once it is made; not called for a single policy.
      free: Bytes that a program can allocate on each device.
    """

    def __init__(
        self,
        steps: Mapping[str, Any],
        mesh: Mesh,
        remedies: Callable[[Fit, int], Sequence[str]],
        note: Callable[[RematChoice], None],
        free: FreeBytes = free_bytes,
    ) -> None:
        self._steps, self._mesh, self._remedies = steps, mesh, remedies
        self._note, self._free = note, free
        self._step: Callable[..., Any] | None = None

    def __call__(self, state: PyTree, *inputs: PyTree) -> Any:
        """Does one step; see `training.step.TrainStep`.

        Raises:
          DeviceMemoryError: Before the first step, if no policy fits.
        """
        if self._step is None:
            return self._first(state, *inputs)
        return self._step(state, *inputs)

    def _first(self, state: PyTree, *inputs: PyTree) -> Any:
        """Chooses the policy, and does the first step with it."""
        fastest = next(iter(self._steps))
        free = self._free(list(self._mesh.devices.flat)) if len(self._steps) > 1 else None
        # If one process has no limit to go by, none has.
        free = smallest_of_processes(-1 if free is None else max(free, 0))
        if free < 0:
            self._step = self._steps[fastest]
            if len(self._steps) > 1:
                self._note(RematChoice(fastest, None))
            return self._step(state, *inputs)
        fits: list[Fit] = []
        for policy, step in self._steps.items():
            fit, compiled = compile_fit(policy, step, (state, *inputs))
            fits_here = compiled is not None and (fit.allocated or 0) <= free
            if smallest_of_processes(int(fits_here)):
                self._step = compiled
                try:
                    done = jax.block_until_ready(compiled(state, *inputs))
                except jax.errors.JaxRuntimeError as error:
                    if not is_out_of_memory(error) or not _still_there(state):
                        raise
                    fit = Fit(policy, fit.arguments, None)
                else:
                    choice = RematChoice(policy, free, (*fits, fit))
                    log(str(choice))
                    self._note(choice)
                    return done
            fits.append(fit)
        raise _nothing_fits(fits, free, self._remedies(fits[-1], free))


def make_fitting_step(
    config: ConfigDict,
    make_step: Callable[[str], Callable[..., Any]],
    abstract: TrainState,
    rows: NamedSharding,
    note: Callable[[RematChoice], None],
    free: FreeBytes = free_bytes,
) -> FittingStep:
    """Returns a run's step, compiled for the policies that the config allows when it is called.

    Args:
      config: Experiment config.
      make_step: Returns the step with a policy, not compiled.
      abstract: Shapes and shardings of the state.
      rows: Sharding of the batch.
      note: Receives the choice, see `FittingStep`.
      free: Bytes that a program can allocate on each device.
    """
    mesh: Any = rows.mesh
    steps = {
        policy: jit_step(
            skip_batches(config, make_step(policy)), abstract, rows, mesh, xla_options(config)
        )
        for policy in remat_policies(config)
    }
    return FittingStep(steps, mesh, make_remedies(config, rows, abstract), note, free)


def compile_fit(policy: str, step: Any, arguments: tuple[PyTree, ...]) -> tuple[Fit, Any]:
    """Compiles a step for its arguments.

    Args:
      policy: Name of its policy.
      step: The jitted step.
      arguments: Arrays, or shapes with shardings.

    Returns:
      Its memory, and the compiled program; None if the compiler is out of memory.
    """
    try:
        compiled = step.lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        held = bytes_per_chip(arguments)
        refused = out_of_memory(str(error), held)
        return Fit(policy, held, None if refused is None else refused[0] - held), None
    analysis = compiled.memory_analysis()
    return Fit(policy, analysis.argument_size_in_bytes, allocated_bytes(analysis)), compiled


def _still_there(state: PyTree) -> bool:
    """Whether a step that failed has left the state, and no other process waits in that step."""
    leaves = jax.tree.leaves(state)
    return jax.process_count() == 1 and not any(leaf.is_deleted() for leaf in leaves)


def _nothing_fits(fits: Sequence[Fit], free: int, remedies: Sequence[str]) -> DeviceMemoryError:
    available = gib(fits[-1].arguments + free)
    found = (
        f"by estimate, one of these is enough: {', '.join(remedies)}"
        if remedies
        else "use devices with more memory, or more of them"
    )
    return DeviceMemoryError(
        f"the training step does not fit into the {available} that it can have of each device: of "
        f"what the backward pass keeps, {'; '.join(map(str, fits))}",
        f"{found}; python -m dsr_jax.compile reports a denoiser's memory without a device",
    )


def make_remedies(
    config: ConfigDict, rows: NamedSharding, abstract: TrainState
) -> Callable[[Fit, int], list[str]]:
    """Returns a function that names changes with which a step that does not fit would.

    Its estimate: a step allocates gradients, which any batch needs, and activations, proportional
    to the images that a device processes at a time.

    Args:
      config: Experiment config.
      rows: Sharding of the batch.
      abstract: Shapes and shardings of the state.
    """
    images = rows.shard_shape((config.data.global_batch,))[0]
    gradients, count = bytes_per_chip(abstract.params), config.optim.accumulate
    # Micro-batches add their gradients to a sum.
    fixed = gradients * (1 if count == 1 else 2)

    def remedies(fit: Fit, free: int) -> list[str]:
        if fit.allocated is None:
            return []
        found, activations = [], max(fit.allocated - fixed, 0)
        if config.precision.compute == "float32" and fixed + activations / 2 <= free:
            found.append("--config.precision.compute=bfloat16")
        if not trains_decoder(config):
            smaller = [n for n in range(count + 1, images + 1) if images % n == 0]
            enough = [n for n in smaller if 2 * gradients + activations * count / n <= free]
            found += [
                f"--config.optim.accumulate={n} ({images // n} images at a time on each device)"
                for n in enough[:1]
            ]
        found += _more_memory(rows.mesh, fit.allocated - free)
        found += _more_shards(config, rows.mesh, abstract, fit.allocated - free)
        fewer = int(images * (free - fixed) / max(activations, 1)) // count * count
        if fewer > 0:
            size = config.data.global_batch // images * fewer
            found.append(f"in a new run --config.data.global_batch={size}")
        return found

    return remedies


def _more_memory(mesh: Any, lacking: int) -> list[str]:
    """Returns the environment variable by which JAX takes more of a GPU's memory, if enough."""
    kind = mesh.devices.flat[0].device_kind
    for card in CARDS.values():
        more = (1 - RESERVE) * (MAX_FRACTION * card.memory_bytes - card.hbm_bytes)
        if card.device_kind == kind and more >= lacking:
            return [f"in the environment {memory_fraction()[0]}={MAX_FRACTION}"]
    return []


def _more_shards(config: ConfigDict, mesh: Any, abstract: TrainState, lacking: int) -> list[str]:
    """Returns the smallest mesh.fsdp with which each device's part of the state is small enough."""
    width = config.decoder.hidden_size or config.model.hidden_size
    shards, split = mesh.shape["fsdp"], mesh.size // mesh.shape["tensor"]
    # With zero1 only moments and EMA weights are divided yet.
    whole = sum(
        bytes_per_chip(leaf) * (shards if "fsdp" in str(leaf.sharding.spec) else 1)
        for leaf in jax.tree.leaves(abstract)
    )
    for n in range(shards + 1, split + 1):
        if split % n == width % n == 0 and bytes_per_chip(abstract) - whole / n >= lacking:
            rules = "" if config.sharding.rules == "fsdp" else " --config.sharding.rules=fsdp"
            return [f"--config.mesh.data=-1 --config.mesh.fsdp={n}{rules}"]
    return []


def gib(size: float) -> str:
    """Returns a size in GiB, for messages."""
    return f"{size / GIB:.2f} GiB"
