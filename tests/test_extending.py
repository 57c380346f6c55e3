"""The denoiser and the encoder that docs/extending.md defines, run by the commands."""

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsr_jax import build, export, sample, train
from dsr_jax import config as configs
from dsr_jax.core.errors import ConfigError, ConversionError
from dsr_jax.models.denoiser import Denoiser
from dsr_jax.models.registry import denoiser_class
from dsr_jax.parallel.topologies import find_topology
from dsr_jax.planning.sweep import trials
from dsr_jax.telemetry.writers import read_metrics
from tests.telemetry.test_flops import equations
from tests.test_docs import blocks
from tools.describe import describe

SMALL = (
    "--config.model.hidden_size=8",
    "--config.model.depth=1",
    "--config.train.steps=2",
    "--config.data.global_batch=8",
    "--config.log.every_steps=1",
    "--config.checkpoint.every_steps=2",
    "--config.sample.every_steps=0",
    "--config.sample.num_points=3",
)


@pytest.fixture(scope="module", autouse=True)
def modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The page's files in a folder on the path."""
    folder = tmp_path_factory.mktemp("modules")
    for page, code in blocks("python"):
        if page.name == "extending.md" and (name := re.match(r"# (\w+\.py)\n", code)):
            (folder / name[1]).write_text(code)
    (folder / "wrong_denoisers.py").write_text(
        "from dsr_jax.models.denoiser import Denoiser\n\n\n"
        "class Untyped(Denoiser):\n    widths: object = None\n\n\nclass Other:\n    pass\n"
    )
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def run(modules: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run of the page's denoiser, with its own key overridden."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    config = f"--config={modules / 'my_denoiser_config.py'}"
    key = "--config.model.kernel_size=1"
    assert train.main([config, f"--workdir={workdir}", *SMALL, key]) == 0
    return workdir


def test_an_outside_denoiser_trains_and_its_key_survives(run: Path) -> None:
    assert all(np.isfinite(record["loss"]) for record in read_metrics(run))
    config = configs.load_run(run)
    assert (config.model.name, config.model.kernel_size) == ("my_denoiser:ConvNet", 1)


def test_an_outside_denoiser_samples_and_exports_to_a_folder(run: Path, tmp_path: Path) -> None:
    sample.main([f"--workdir={run}", "--num-samples=8", "--batch=8", f"--out={tmp_path / 'npz'}"])
    assert list((tmp_path / "npz").glob("*.npz"))
    export.main([f"--workdir={run}", f"--out={tmp_path / 'folder'}"])
    assert (tmp_path / "folder" / "params.safetensors").is_file()
    with pytest.raises(ConversionError, match="my_denoiser:ConvNet has no converter.*\n.*folder"):
        export.main([f"--workdir={run}", f"--out={tmp_path / 'x.safetensors'}"])


def test_a_run_starts_from_an_exported_folder(run: Path, tmp_path: Path) -> None:
    export.main([f"--workdir={run}", f"--out={tmp_path / 'folder'}"])
    start = f"--config.train.init_from={tmp_path / 'folder'}"
    workdir = f"--workdir={tmp_path / 'run'}"
    assert train.main([f"--config={run / 'config.json'}", workdir, start]) == 0


def test_describe_and_the_planned_program_of_an_outside_denoiser(modules: Path) -> None:
    config = configs.load(str(modules / "my_denoiser_config.py"), SMALL)
    summary = describe(config)
    assert summary["network"]["name"] == "my_denoiser:ConvNet"
    assert summary["network"]["register_flops"] == 0
    assert summary["network"]["forward_flops"] == flops_of_program(config)
    # It has no field `remat` that a plan could set.
    layouts = trials(config, find_topology("v5e:2x2"), fsdp=(1,), accumulate=(1,), tensor=(1,))
    changed = [trial.apply(config) for trial in layouts]
    assert len(changed) == 1
    for candidate in (*changed, *build.policy_configs(config)):
        build.make_model(candidate, build.make_space(candidate)[0])


def flops_of_program(config: configs.ConfigDict) -> int:
    """Twice the multiply-accumulates of the network's convolutions and matmuls, as traced."""
    space, _ = build.make_space(config)
    model = build.make_model(config, space)
    inputs = (jnp.zeros((1, *space.latent_shape)), jnp.zeros(1), jnp.zeros(1, int))
    variables = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    total = 0
    for equation, times in equations(jax.make_jaxpr(model.apply)(variables, *inputs).jaxpr):
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            kernel, out = equation.invars[1].aval.shape, equation.outvars[0].aval.shape
            total += 2 * times * np.prod(kernel[:-1]) * np.prod(out)
    return int(total)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("unet", "choose from lightningdit"),
        ("nowhere:Net", "'nowhere' cannot be imported"),
        ("my_denoiser:Missing", "has no 'Missing'"),
        ("wrong_denoisers:Other", "is not a denoiser"),
        ("wrong_denoisers:Untyped", "field 'widths' has no default"),
    ],
)
def test_what_is_not_a_denoiser_is_named(name: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        configs.use_denoiser(configs.base_config(), name)


def test_keys_of_a_denoiser_leave_with_it() -> None:
    config = configs.base_config()
    configs.use_denoiser(config, "my_denoiser:ConvNet")
    assert config.model.kernel_size == 3
    configs.use_denoiser(config, "jit")
    assert "kernel_size" not in config.model and config.model.name == "jit"
    with pytest.raises(ConfigError, match="unknown config key"):
        configs.apply_overrides(config, ["--config.model.kernel_size=5"])
    configs.apply_overrides(
        config, ["--config.model.kernel_size=5", "--config.model.name=my_denoiser:ConvNet"]
    )
    assert config.model.kernel_size == 5


def test_registers_are_refused_where_a_denoiser_has_none() -> None:
    config = configs.base_config()
    configs.use_denoiser(config, "my_denoiser:ConvNet")
    space, _ = build.make_space(config)
    with pytest.raises(ConfigError, match="has no registers.*\n.*registers.num=0"):
        build.make_model(config, space)
    config.registers.num = 0
    assert isinstance(build.make_model(config, space), Denoiser)
    assert denoiser_class("my_denoiser:ConvNet") is importlib.import_module("my_denoiser").ConvNet


ENCODER = (
    "--config.registers.num=0",
    "--config.space.name=rae",
    "--config.space.encoder=random:my_encoder:ConvStem",
    "--config.space.image_size=16",
    "--config.data.channels=3",
    "--config.model.num_heads=2",
)


def test_a_denoiser_trains_on_an_outside_encoders_latents(tmp_path: Path) -> None:
    base = tmp_path / "base.py"
    base.write_text(
        "from dsr_jax.config import base_config\n\n\ndef get_config(arg=None):\n"
        "    return base_config()\n"
    )
    run = [f"--config={base}", f"--workdir={tmp_path / 'run'}", *SMALL, *ENCODER]
    assert train.main(run) == 0
    assert all(np.isfinite(record["loss"]) for record in read_metrics(tmp_path / "run"))


def test_an_encoder_without_neurons_refuses_test_time_registers() -> None:
    config = configs.base_config()
    configs.apply_overrides(config, [*ENCODER, "--config.space.neurons=siglip2-base-patch16-256"])
    with pytest.raises(ConfigError, match="ConvStem does not support test-time registers"):
        build.make_space(config)


def test_an_encoder_that_lacks_a_member_is_named(modules: Path) -> None:
    (modules / "bare_encoder.py").write_text(
        "import flax.linen as nn\n\n\nclass Bare(nn.Module):\n    patch_size: int = 4\n"
    )
    config = configs.base_config()
    configs.apply_overrides(config, [*ENCODER, "--config.space.encoder=random:bare_encoder:Bare"])
    with pytest.raises(ConfigError, match="Bare lacks hidden_size, pixel_mean, pixel_std"):
        build.make_space(config)
