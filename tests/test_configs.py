"""Every config file, with every argument that its docstring names, built without any array."""

import ast
import re
import shlex
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from dsr_jax import build
from dsr_jax import config as configs
from dsr_jax.build.abstract import abstract_batch, abstract_decoder_parts, abstract_space
from dsr_jax.core.errors import ConfigError
from dsr_jax.core.trees import count_params, flatten_names
from dsr_jax.parallel.axes import Constrain
from dsr_jax.parallel.shardings import sharded_fraction
from dsr_jax.training.decoder_step import make_decoder_step

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "configs").glob("*.py"))
LOCAL = "runlocal"
FULLY_SHARDED = ("--config.mesh.data=1", "--config.mesh.fsdp=-1")
BASELINE = "registers=0,ttr=False"
PUBLISHED = {
    f"rae_dit:variant=S,{BASELINE}": (33_649_792, 12.404),
    "rae_dit:variant=S": (33_677_440, 13.666),
    f"rae_dit:variant=B,{BASELINE}": (131_884_288, 46.596),
    "rae_dit:variant=B": (131_939_584, 51.157),
    f"rae_dit:{BASELINE}": (677_248_384, 238.121),
    "rae_dit:": (677_331_328, 262.87),
    f"rae_dit:encoder=siglip2-so400m,{BASELINE}": (678_133_504, 238.574),
    "rae_dit:encoder=siglip2-so400m": (678_216_448, 263.32),
    "rae_dit:encoder=dinov2-base,registers=0": (677_248_384, 238.121),
    "rae_dit:encoder=dinov2-with-registers-base": (677_331_328, 262.87),
    f"rae_dit_dh:{BASELINE}": (838_675_796, 323.16),
    "rae_dit_dh:": (838_906_196, 359.27),
    "sit_xl:registers=0": (675_129_632, 237.24),
    "sit_xl:": (675_212_576, 261.99),
    "jit_h:registers=0": (952_842_048, 363.9),
    "jit_h:": (952_934_208, 397.5),
}
"""Parameters and GFLOPs of every row of the paper's tables, by config."""


def docstring(path: Path) -> str:
    """What the file says about itself, without running it."""
    return ast.get_docstring(ast.parse(path.read_text())) or ""


def documented(path: Path) -> list[str]:
    """The arguments in the paragraph that begins with "Arguments:", such as `variant=XL`."""
    _, _, after = docstring(path).partition("Arguments:")
    return re.findall(r"`(\w+(?:=[^`]+)?)`", after.partition("\n\n")[0])


def variants() -> list[tuple[Path, str]]:
    """Every file as it is, with each argument, and with each argument on a laptop."""
    found = []
    for path in FILES:
        others = [argument for argument in documented(path) if argument != LOCAL]
        local = [LOCAL, *(f"{argument},{LOCAL}" for argument in others)]
        found += [(path, argument) for argument in ["", *others, *local]]
    return found


VARIANTS = variants()
NAMES = [f"{path.stem}:{argument}" for path, argument in VARIANTS]
TRACED = [
    pytest.param(*variant, id=name, marks=() if variant[1] in ("", LOCAL) else (pytest.mark.slow,))
    for variant, name in zip(VARIANTS, NAMES, strict=True)
]


@pytest.mark.parametrize(
    ("argument", "choices"),
    [
        ("jit_h.py:variant=H-14", "B-16, B-32, L-16"),
        ("rae_dit.py:variant=M", "S, B, L, XL"),
        ("rae_dit_dh.py:variant=M", "S, B, L, XL"),
        ("sit_xl.py:variant=M", "S, B, L, XL"),
        ("rae_decoder.py:decoder=M", "ViTB, ViTL, ViTXL"),
        ("digits.py:family=unet", "lightningdit, ditdh, sit, jit"),
        ("scale_rae.py:language=2B", "0.5B, 1.5B, 3B, 7B"),
        ("scale_rae.py:variant=M", "2.4B, XL"),
    ],
)
def test_an_unknown_size_is_rejected_with_the_choices(argument: str, choices: str) -> None:
    with pytest.raises(ConfigError) as caught:
        configs.load(f"{ROOT}/configs/{argument}")
    key, _, value = argument.partition(":")[2].partition("=")
    assert f"config argument {key}={value}" in caught.value.problem
    assert choices in caught.value.remedy


def shapes(tree: Any) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Shape and dtype of every leaf, by name."""
    return {name: (leaf.shape, leaf.dtype) for name, leaf in flatten_names(vars(tree)).items()}


def check_decoder(config: configs.ConfigDict) -> None:
    """The state and a step of a decoder's training, with frozen networks of shapes alone."""
    mesh, rules = build.make_mesh(config), build.make_rules(config)
    optimizer, parts = build.make_optimizer(config), abstract_decoder_parts(config, rules)
    frozen = parts.variables
    abstract, _ = build.make_decoder_state(config, parts, optimizer, mesh, rules)
    settings = build.make_loss_settings(config)
    step = make_decoder_step(parts.networks, settings, optimizer, seed=config.seed)
    rows = abstract_batch(config, parts.space)
    after, metrics = jax.eval_shape(step, abstract, rows, frozen)
    assert shapes(after) == shapes(abstract)
    assert metrics["loss"].shape == () and metrics["finite"].dtype == bool
    batch = rows["image"]
    reconstruct = build.make_reconstruct(config, parts)
    decoded = jax.eval_shape(reconstruct, abstract.ema[config.sample.ema], frozen, batch)
    assert (decoded.shape, decoded.dtype) == (batch.shape, np.uint8)


@pytest.mark.parametrize(("path", "argument"), TRACED)
def test_the_state_a_step_and_samples_have_their_shapes(path: Path, argument: str) -> None:
    config = configs.load(f"{path}:{argument}")
    if configs.trains_decoder(config):
        check_decoder(config)
        return
    mesh, rules = build.make_mesh(config), build.make_rules(config)
    space, variables = abstract_space(config)
    model = build.make_model(config, space, Constrain(rules, mesh))
    optimizer = build.make_optimizer(config)
    abstract, _ = build.make_state(config, model, space, optimizer, mesh, rules)

    batch = abstract_batch(config, space)
    step = build.make_step(config, model, space, optimizer)
    after, metrics = jax.eval_shape(step, abstract, batch, variables)
    assert shapes(after) == shapes(abstract)
    assert metrics["loss"].shape == () and metrics["finite"].dtype == bool

    sampler = build.make_sampler(config, model, space, mesh, rules)
    weights = abstract.params if config.sample.ema == "none" else abstract.ema[config.sample.ema]
    count = -(-config.sample.batch // mesh.size) * mesh.size
    tokens = (config.language.max_length,) if configs.has_text(config) else ()
    indices, labels = np.arange(count, dtype=np.uint32), np.zeros((count, *tokens), np.int32)
    samples = jax.eval_shape(lambda *given: sampler(*given, indices, labels), weights, variables)
    size = batch["image"].shape[1:]
    assert samples.images.shape == (count, *size) and samples.images.dtype == np.uint8


@pytest.mark.parametrize("row", PUBLISHED)
def test_a_row_of_the_paper_has_its_size_and_cost_and_is_sharded(row: str) -> None:
    """Source: spec denoiser 1.13, 2.4, 4, 10.1 and 11; the original code gave the numbers."""
    name, _, argument = row.partition(":")
    config = configs.load(f"{ROOT / 'configs' / name}.py:{argument}", FULLY_SHARDED)
    mesh, rules = build.make_mesh(config), build.make_rules(config)
    space, _ = abstract_space(config)
    model = build.make_model(config, space, Constrain(rules, mesh))
    params = build.abstract_params(model, space, mesh, rules)
    count, gflops = PUBLISHED[row]
    assert count_params(params) == count
    decimals = len(str(gflops).partition(".")[2])
    assert round(model.forward_flops() / 1e9, decimals) == gflops
    layout = jax.tree.map(lambda leaf: leaf.sharding, params)
    assert sharded_fraction(params, layout) > 0.95


@pytest.mark.parametrize(("path", "argument"), VARIANTS, ids=NAMES)
def test_all_keys_are_known_and_survive_the_run_folder(path: Path, argument: str) -> None:
    config = configs.load(f"{path}:{argument}")
    assert configs.from_json(configs.to_json(config), str(path)).to_dict() == config.to_dict()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_smoke_run_is_small_and_needs_no_files(path: Path) -> None:
    config, whole = configs.load(f"{path}:{LOCAL}"), configs.load(str(path))
    assert not config.data.root and config.train.steps <= 20
    assert config.train.steps < whole.train.steps
    assert config.train.steps >= config.log.every_steps, "it would end without a loss"
    source = build.make_source(config)
    example, data = source[0], config.data
    assert example["image"].shape == (data.image_size, data.image_size, data.channels)
    if configs.has_text(config):
        assert example["tokens"].shape == (config.language.max_length,)
    else:
        assert 0 <= example["label"] < data.num_classes
    assert len(source) >= data.global_batch


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_docstring_names_every_argument(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no other: the file's own call of `parse_arg` is what counts."""
    keys: set[str] = set()
    parse = configs.parse_arg

    def note(arg: str | None, **defaults: Any) -> configs.ConfigDict:
        keys.update(defaults)
        return parse(arg, **defaults)

    monkeypatch.setattr(configs, "parse_arg", note)
    configs.load_file(str(path))
    assert LOCAL in keys
    assert {argument.partition("=")[0] for argument in documented(path)} == keys


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_commands_in_the_docstring_work(path: Path) -> None:
    """As far as the config goes: its file, argument and overrides."""
    text = docstring(path).replace("\\\n", " ")
    commands = re.findall(r"python -m dsr_jax\.train(?:_decoder)? (.*)", text)
    assert commands
    for command in commands:
        words = shlex.split(command)
        (config,) = (word for word in words if word.startswith("--config="))
        assert config.startswith(f"--config=configs/{path.name}")
        overrides = [word for word in words if word.startswith("--config.")]
        configs.load(str(ROOT / config.removeprefix("--config=")), overrides)


def test_a_config_file_cannot_invent_keys(tmp_path: Path) -> None:
    file = tmp_path / "typo.py"
    text = (ROOT / "configs" / "digits.py").read_text()
    file.write_text(text.replace("config.optim.lr = ", "config.optim.lrr = "))
    with pytest.raises(ConfigError, match=r"typo\.py, line \d+: .*lrr"):
        configs.load(str(file))
    file.write_text(text.replace("config.optim.lr = 2e-3", "config.optim.lr = 'fast'"))
    with pytest.raises(ConfigError, match="str"):
        configs.load(str(file))


@pytest.mark.parametrize("name", ["scale_rae", "shapes_t2i"])
def test_the_rate_of_text_configs_decays_to_zero(name: str) -> None:
    config = configs.load(f"{ROOT / 'configs' / name}.py:steps=1000")
    rate = build.make_optimizer(config).learning_rate
    assert rate(999) < 1e-4 * config.optim.lr and rate(1000) == 0


def test_the_loss_of_shapes_weighs_times_at_which_objects_are_undecided() -> None:
    config = configs.load(f"{ROOT / 'configs' / 'shapes_t2i.py'}")
    t = np.asarray(build.make_time_sampler(config)((np.arange(10_000) + 0.5) / 10_000))
    weights = np.maximum(t, 0.05) ** -2.0
    assert config.objective.prediction == "data" and 0.6 < np.median(t) < 0.95
    assert weights[t > 0.6].sum() > 0.5 * weights.sum()
