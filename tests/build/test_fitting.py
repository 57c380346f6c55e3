"""Choice of what the backward pass recomputes, by the memory that programs and devices have."""

import dataclasses
import functools
import math
import re
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dsr_jax import build, train
from dsr_jax import config as configs
from dsr_jax.build.abstract import abstract_batch
from dsr_jax.build.fitting import (
    Fit,
    FittingStep,
    RematChoice,
    _more_memory,
    _more_shards,
    compile_fit,
    make_remedies,
)
from dsr_jax.core.errors import ConfigError, DeviceMemoryError
from dsr_jax.core.files import read_json
from dsr_jax.models.blocks import REMAT_POLICIES
from dsr_jax.parallel.axes import Constrain
from dsr_jax.parallel.device_memory import GIB, free_bytes, smallest_of_processes
from dsr_jax.parallel.gpus import MEMORY_FRACTIONS
from dsr_jax.parallel.mesh import MeshShape, make_mesh
from dsr_jax.parallel.shardings import batch_sharding
from dsr_jax.runs.runner import TrainingJob, run_command
from tests.programs import quick_programs

REPOSITORY = Path(__file__).parents[2]
DIGITS = f"{REPOSITORY / 'configs' / 'digits.py'}:runlocal"
TINY = (
    *("--config.model.hidden_size=16", "--config.model.depth=4", "--config.model.num_heads=2"),
    *("--config.registers.start=0", "--config.model.unroll=none", "--config.train.steps=2"),
    *("--config.data.global_batch=64", "--config.checkpoint.every_steps=2"),
    *("--config.sample.every_steps=0", "--config.eval.classifier="),
)


def toy_step(policy: str) -> Any:
    """A step whose backward pass keeps much, less or nothing of what it computed."""

    def step(state: jax.Array, batch: jax.Array) -> tuple[jax.Array, jax.Array]:
        def block(x: jax.Array, _: None) -> tuple[jax.Array, None]:
            for weights in (state, jnp.cos(state)):
                x = jnp.sin(jnp.exp(jnp.tanh(x @ weights)))
            return x, None

        if policy != "none":
            block = jax.checkpoint(block, policy=REMAT_POLICIES[policy], prevent_cse=False)

        def total(x: jax.Array) -> jax.Array:
            return jnp.sum(jax.lax.scan(block, x, length=16)[0] ** 2)

        loss, grad = jax.value_and_grad(total)(batch)
        return state + 1e-3 * grad[: len(state)], loss

    return jax.jit(step, donate_argnums=0)


def toy_arrays() -> tuple[jax.Array, jax.Array]:
    return 0.1 * jnp.eye(32), jnp.ones((64, 32))


@pytest.fixture(scope="module")
def steps() -> dict[str, Any]:
    return {policy: toy_step(policy) for policy in REMAT_POLICIES}


@pytest.fixture(scope="module")
def needed(steps: dict[str, Any]) -> dict[str, int]:
    return {
        policy: compile_fit(policy, step, toy_arrays())[0].allocated
        for policy, step in steps.items()
    }


def fitting(steps: dict[str, Any], free: int | None, chosen: list[RematChoice]) -> FittingStep:
    mesh = make_mesh(MeshShape(1, 1, 1), jax.devices()[:1])
    return FittingStep(steps, mesh, lambda *_: ["half of it"], chosen.append, lambda _: free)


def test_policies_are_ordered_by_memory(needed: dict[str, int]) -> None:
    assert list(needed) == ["none", "dots", "full"]
    assert needed["none"] > needed["dots"] > needed["full"] > 0


@pytest.mark.parametrize("policy", REMAT_POLICIES)
def test_the_fastest_policy_that_fits_is_used(
    policy: str, steps: dict[str, Any], needed: dict[str, int], capfd: pytest.CaptureFixture[str]
) -> None:
    chosen: list[RematChoice] = []
    step = fitting(steps, needed[policy], chosen)
    state, batch = toy_arrays()
    for _ in range(2):
        state, loss = step(state, batch)
    want, want_loss = steps["none"](steps["none"](*toy_arrays())[0], batch)
    assert jnp.allclose(state, want, rtol=1e-5) and jnp.allclose(loss, want_loss, rtol=1e-5)
    (choice,) = chosen
    tried = list(REMAT_POLICIES)[: list(REMAT_POLICIES).index(policy) + 1]
    assert choice.policy == policy and [fit.policy for fit in choice.fits] == tried
    assert [fit.allocated for fit in choice.fits] == [needed[name] for name in tried]
    printed = capfd.readouterr().err
    assert f"{policy} is used" in printed and all(f"{name} needs" in printed for name in tried)


def test_a_step_that_never_fits_ends_before_it_runs(
    steps: dict[str, Any], needed: dict[str, int]
) -> None:
    state, batch = toy_arrays()
    with pytest.raises(DeviceMemoryError) as caught:
        fitting(steps, needed["full"] - 1, [])(state, batch)
    assert all(f"{policy} needs" in caught.value.problem for policy in REMAT_POLICIES)
    assert "half of it" in caught.value.remedy
    assert not state.is_deleted()


def test_without_a_limit_nothing_is_compiled_twice(steps: dict[str, Any]) -> None:
    """As on CPUs: the jitted step of the fastest policy runs as it is."""
    chosen: list[RematChoice] = []
    assert free_bytes(jax.devices()) is None
    never = dict.fromkeys(["dots", "full"])
    fitting({"none": steps["none"], **never}, None, chosen)(*toy_arrays())
    assert chosen == [RematChoice("none", None)]


def test_a_policy_that_the_config_names_is_not_questioned(steps: dict[str, Any]) -> None:
    chosen: list[RematChoice] = []
    fitting({"dots": steps["dots"]}, 0, chosen)(*toy_arrays())
    assert not chosen


@dataclasses.dataclass
class OutOfMemory:
    """A jitted step that fails when it is compiled, or when it runs."""

    step: Any
    when: str
    message: str = "RESOURCE_EXHAUSTED: Out of memory"

    def fail(self) -> None:
        raise jax.errors.JaxRuntimeError(self.message)

    def lower(self, *arguments: Any) -> Any:
        self.lowered = self.step.lower(*arguments)
        return self

    def compile(self) -> Any:
        if self.when == "compiling":
            self.fail()
        self.memory_analysis = self.lowered.compile().memory_analysis
        return self

    def __call__(self, *arguments: Any) -> Any:
        self.fail()


@pytest.mark.parametrize("when", ["compiling", "running"])
def test_an_error_of_the_device_means_the_next_policy(steps: dict[str, Any], when: str) -> None:
    chosen: list[RematChoice] = []
    step = fitting(steps | {"none": OutOfMemory(steps["none"], when)}, 2**40, chosen)
    step(*toy_arrays())
    assert chosen[0].policy == "dots"
    assert chosen[0].fits[0].allocated is None and "none is out of memory" in str(chosen[0])


def test_what_a_tpu_compiler_needs_is_read_from_its_error(steps: dict[str, Any]) -> None:
    """It compiles nothing that does not fit, so no other figure leads to remedies."""
    text = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm."
    tpu = {policy: OutOfMemory(step, "compiling", text) for policy, step in steps.items()}
    found: list[tuple[Fit, int]] = []
    mesh = make_mesh(MeshShape(1, 1, 1), jax.devices()[:1])
    remedies = lambda fit, free: found.append((fit, free)) or ["half of it"]  # noqa: E731
    # Even where the devices seem to have more than the compiler.
    step = FittingStep(tpu, mesh, remedies, lambda choice: None, lambda _: 32 * GIB)
    with pytest.raises(DeviceMemoryError, match=r"full needs 20\.50 GiB.*\n.*half of it"):
        step(*toy_arrays())
    ((fit, _),) = found
    assert fit.arguments + fit.allocated == int(20.5 * GIB)


@pytest.mark.parametrize(
    ("rules", "mesh", "lacking", "named"),
    [
        # Of 1,280 bytes in all a device has 768: 427 of 3 shards, 320 of 4, 213 of 6.
        ("fsdp", {"data": 12, "fsdp": 2, "tensor": 1}, 340, 3),
        ("zero1", {"data": 12, "fsdp": 2, "tensor": 1}, 400, 4),
        ("zero1", {"data": 12, "fsdp": 2, "tensor": 1}, 500, 6),
        # Of 768: 4 shards would be enough, but do not divide the 6 groups of 24 devices.
        ("fsdp", {"data": 6, "fsdp": 1, "tensor": 4}, 550, 6),
    ],
)
def test_the_named_mesh_exists_and_is_enough(
    rules: str, mesh: dict[str, int], lacking: int, named: int
) -> None:
    config = configs.load(
        DIGITS, ["--config.model.hidden_size=48", f"--config.sharding.rules={rules}"]
    )
    devices = make_mesh(MeshShape(4, 2, 1))
    abstract: Any = {
        name: jax.ShapeDtypeStruct((size,), jnp.uint8, sharding=NamedSharding(devices, spec))
        for name, size, spec in (
            ("whole", 256, PartitionSpec()),
            ("divided", 1024, PartitionSpec("fsdp")),
        )
    }
    planned = types.SimpleNamespace(shape=mesh, size=math.prod(mesh.values()))
    (remedy,) = _more_shards(config, planned, abstract, lacking)
    assert remedy.split()[:2] == ["--config.mesh.data=-1", f"--config.mesh.fsdp={named}"]


def test_the_memory_that_jax_leaves_to_others_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in MEMORY_FRACTIONS:
        monkeypatch.delenv(name, raising=False)
    device = types.SimpleNamespace(device_kind="NVIDIA H100 80GB HBM3")
    mesh = types.SimpleNamespace(devices=np.array([device]))
    assert _more_memory(mesh, 15 * GIB) == [f"in the environment {MEMORY_FRACTIONS[0]}=0.95"]
    assert not _more_memory(mesh, 16 * GIB)
    assert not _more_memory(make_mesh(MeshShape(8, 1, 1)), 1)


def test_the_smallest_value_of_one_process_is_its_own() -> None:
    assert smallest_of_processes(2**40) == 2**40


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with quick_programs(tmp_path_factory.mktemp("programs")):
        yield


WHOLE = (*TINY, "--config.sharding.rules=fsdp", "--config.mesh.data=2", "--config.mesh.fsdp=4")


def sharded_fits(policies: Sequence[str], *overrides: str) -> tuple[dict[str, Fit], Any]:
    """Memory of a denoiser's step on the eight devices of the tests, and its remedies."""
    config = configs.load(DIGITS, [*WHOLE, *overrides])
    mesh, rules = build.make_mesh(config), build.make_rules(config)
    space, variables = build.make_space(config, mesh)
    model, optimizer = (
        build.make_model(config, space, Constrain(rules, mesh)),
        build.make_optimizer(config),
    )
    abstract, _ = build.make_state(config, model, space, optimizer, mesh, rules)
    rows = batch_sharding(mesh, rules)
    inputs = abstract, abstract_batch(config, space, rows), variables
    found = {}
    for policy in policies:
        step = build.make_step(
            config, build.with_remat(config, model, policy), space, optimizer, abstract
        )
        jitted = build.jit_step(step, abstract, rows, mesh)
        found[policy] = compile_fit(policy, jitted, inputs)[0]
    return found, make_remedies(config, rows, abstract)


@pytest.fixture(scope="module")
def sharded(programs: None) -> tuple[dict[str, Fit], Any]:
    return sharded_fits(list(REMAT_POLICIES))


@pytest.mark.slow
def test_what_an_error_names_is_enough(sharded: tuple[dict[str, Fit], Any]) -> None:
    fits, remedies = sharded
    assert fits["none"].allocated > fits["dots"].allocated > fits["full"].allocated
    assert len({fit.arguments for fit in fits.values()}) == 1
    free = int(0.7 * fits["full"].allocated)
    named = ", ".join(remedies(fits["full"], free))
    changes = re.findall(r"--config\.(?:optim\.accumulate|data\.global_batch)=\d+", named)
    assert len(changes) == 2
    for change in changes:
        changed, _ = sharded_fits(["full"], change)
        assert changed["full"].allocated <= free
    assert not remedies(fits["full"], 0)


@pytest.mark.slow
def test_a_run_records_its_choice_or_ends_before_its_first_step(
    sharded: tuple[dict[str, Fit], Any], tmp_path: Path
) -> None:
    fits, _ = sharded

    def run(name: str, free: int) -> int:
        make_job: Callable[..., TrainingJob] = functools.partial(
            train.make_job, free_memory=lambda devices: free
        )
        words = [f"--config={DIGITS}", f"--workdir={tmp_path / name}", *WHOLE]
        return run_command(words, make_job, "test", None)

    assert run("less", fits["none"].allocated - 1) == 0
    (stamp,) = read_json(tmp_path / "less" / "provenance.json")
    assert stamp["remat"]["policy"] == "dots"
    assert stamp["remat"]["free_bytes"] == fits["none"].allocated - 1
    assert [fit["allocated_bytes"] for fit in stamp["remat"]["compiled"]] == [
        fits[policy].allocated for policy in ("none", "dots")
    ]
    with pytest.raises(DeviceMemoryError, match="none needs.*dots needs.*full needs"):
        run("nothing", 0)
    assert not list((tmp_path / "nothing").glob("checkpoints/[0-9]*"))


def test_an_unknown_policy_is_refused(tmp_path: Path) -> None:
    config = configs.load(DIGITS, ["--config.model.remat=some"])
    with pytest.raises(ConfigError, match="config.model.remat='some'.*\n.*auto, none, dots, full"):
        train.make_job(config, tmp_path)


def test_sizes_are_in_gibibytes() -> None:
    assert str(Fit("dots", GIB, GIB // 2)) == "dots needs 1.50 GiB"
