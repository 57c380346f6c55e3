"""Official checkpoints as sources of samples: converted on the way, cached by their content."""

import contextlib
import hashlib
import os
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from dsr_jax import config as configs
from dsr_jax.config import ConfigDict
from dsr_jax.convert import __main__ as convert
from dsr_jax.convert.files import read_conversion
from dsr_jax.convert.readers import open_source
from dsr_jax.convert.recognize import TITLES, recognize
from dsr_jax.core.errors import ConfigError, ConversionError, DamagedFileError
from dsr_jax.core.files import file_digest, rename_synced
from dsr_jax.models.registry import DENOISERS, REGISTERS, TEXT_TO_IMAGE
from dsr_jax.telemetry.progress import announce

_CONFIGS: Mapping[str, str] = MappingProxyType(
    {
        "lightningdit": "rae_dit.py:ttr=False",
        "ditdh": "rae_dit_dh.py:ttr=False",
        "sit": "sit_xl.py",
        "jit": "jit_h.py:variant={variant}",
    }
)
"""The config file whose objective and sampler a family's released checkpoints go with."""

_SOURCES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "lightningdit": ("encoder", "decoder", "statistics"),
        "ditdh": ("encoder", "decoder", "statistics"),
        "sit": ("vae",),
        "jit": (),
    }
)
"""The sources that samples of a family need beside its checkpoint."""

_JIT_SIZES: Mapping[int, str] = MappingProxyType({768: "B", 1024: "L", 1280: "H"})


def default_cache() -> Path:
    """Returns the folder of converted sources: $DSR_CACHE, or ~/.cache/dsr_jax."""
    return Path(os.environ.get("DSR_CACHE") or "~/.cache/dsr_jax").expanduser()


def is_converted(source: str | Path) -> bool:
    """Whether a path is a folder that python -m dsr_jax.convert wrote."""
    return (Path(source) / "conversion.json").is_file()


def family_of_source(source: str | Path) -> str:
    """Returns the denoiser's family of a converted folder or an official checkpoint.

    Raises:
      ConversionError: If it is no denoiser, or cannot be read.
    """
    if is_converted(source):
        return str(read_conversion(Path(source), ("family",))["family"])
    if (Path(source) / "config.json").is_file() and (Path(source) / "checkpoints").is_dir():
        raise ConversionError(
            f"{source} is the folder of a run, not a checkpoint", f"use --workdir={source}"
        )
    found = recognize(open_source(source).state)
    denoisers = [family for family in found if family in (*DENOISERS, TEXT_TO_IMAGE)]
    if len(denoisers) != 1:
        held = " and ".join(TITLES[family] for family in found) or "weights of no known network"
        raise ConversionError(
            f"{source} holds {held}, not a denoiser",
            f"give one of {', '.join(TITLES.get(name, name) for name in DENOISERS)}",
        )
    return denoisers[0]


def convert_cached(source: str, family: str, options: str, cache: Path) -> Path:
    """Returns the converted folder of a source, which is converted unless the cache has it.

    Args:
      source: Value of --source of python -m dsr_jax.convert FAMILY; a converted folder is
        returned as it is.
      family: The command's name.
      options: Other options of the command, as in "--num-heads=12".
      cache: Folder of converted sources; a name in it is a digest of content and options.

    Raises:
      ConversionError: If the source is missing, damaged or of another kind.
    """
    if is_converted(source):
        return Path(source)
    path = Path(source).expanduser()
    content = _content_digest(path) if path.exists() else source
    key = hashlib.sha256("\n".join([content, family, options]).encode()).hexdigest()[:16]
    folder = cache / f"{family}-{key}"
    if _is_intact(folder):
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    # Processes that share the folder do not meet: the first to finish gives it its name.
    own = folder.with_name(f"{folder.name}.{os.uname().nodename}-{os.getpid()}")
    shutil.rmtree(own, ignore_errors=True)
    try:
        with announce(f"converting {source} into {folder}"):
            convert.main(
                [family, f"--source={path if path.exists() else source}", f"--out={own}"]
                + shlex.split(options)
            )
        with contextlib.suppress(OSError):
            rename_synced(own, folder)
    finally:
        shutil.rmtree(own, ignore_errors=True)
    return folder


def _content_digest(path: Path) -> str:
    if path.is_file():
        return file_digest(path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return "\n".join(f"{file.relative_to(path)} {file_digest(file)}" for file in files)


def _is_intact(folder: Path) -> bool:
    if not is_converted(folder):
        return False
    params = folder / "params.safetensors"
    try:
        digest = read_conversion(folder)["params_digest"]
    except DamagedFileError:
        return False
    return params.is_file() and file_digest(params) == digest


def config_of_converted(
    folder: Path, *, encoder: str, decoder: str, statistics: str, vae: str
) -> ConfigDict:
    """Returns a config for a converted denoiser: the family's recipe with the weights' sizes.

    Args:
      folder: The converted denoiser.
      encoder: Encoder of the latents of LightningDiT and DiTDH: a name such as dinov2-base,
        or a converted folder. Only sizes and pixel statistics are read.
      decoder: Converted decoder of these latents.
      statistics: Statistics of these latents; "none" if they are not normalized.
      vae: Converted autoencoder of SiT.

    Raises:
      ConfigError: If one of them is needed and not given, or given and not needed, or the configs
        are not installed.
    """
    record = read_conversion(folder)
    family, model = record["family"], record["model"]
    sources = {"encoder": encoder, "decoder": decoder, "statistics": statistics, "vae": vae}
    check_sources(family, sources)
    config = configs.load_file(_config_path(family, model))
    keys = dict(zip(REGISTERS, ("num", "start", "gate", "condition"), strict=True))
    for name, value in model.items():
        if name in keys:
            config.registers[keys[name]] = value
        elif name in config.model:
            config.model[name] = value
    config.data.num_classes = model["num_classes"]
    config.space.update(encoder="", decoder="", statistics="", neurons="")
    if config.space.name == "rae":
        normalized = "" if statistics == "none" else statistics
        config.space.update(encoder=encoder, decoder=decoder, statistics=normalized)
        sizes = read_conversion(Path(decoder), ("model",))["model"]
        config.data.image_size = sizes["grid"] * sizes["patch_size"]
    elif config.space.name == "vae":
        config.space.vae = vae
        halvings = len(read_conversion(Path(vae), ("model",))["model"]["widths"]) - 1
        config.data.image_size = model["input_size"] * 2**halvings
    else:
        config.data.update(image_size=model["input_size"], channels=model["in_channels"])
    return config


def _config_path(family: str, model: Mapping[str, Any]) -> str:
    if family not in _CONFIGS:
        raise ConfigError(f"there is no default config for {family}", "name one with --config")
    size = _JIT_SIZES.get(model["hidden_size"], "H")
    variant = f"{size}-{32 if model.get('patch_size') == 32 else 16}"
    name = _CONFIGS[family].format(variant=variant if family == "jit" else "")
    folder = Path(__file__).parents[2] / "configs"
    if not (folder / name.partition(":")[0]).is_file():
        raise ConfigError(
            f"{folder / name.partition(':')[0]} is not there: the configs are not installed",
            "name the config with --config, from a checkout of the repository",
        )
    return str(folder / name)


def check_sources(family: str, given: Mapping[str, str]) -> None:
    """Checks that a denoiser gets the sources that its samples need, and no others.

    Args:
      family: The denoiser's family.
      given: Value of --encoder, --decoder, --statistics and --vae by name, "" where not given.

    Raises:
      ConfigError: If one is missing or has no effect. Families without a default config pass.
    """
    if family not in _SOURCES:
        return
    needed = _SOURCES[family]
    if unused := [f"--{name}" for name, value in given.items() if value and name not in needed]:
        raise ConfigError(
            f"{', '.join(unused)} has no effect with {TITLES[family]}",
            "leave it out, or check which checkpoint --converted names",
        )
    if missing := [f"--{name}" for name in needed if not given[name]]:
        raise ConfigError(
            f"--converted with {TITLES[family]} needs {', '.join(missing)} as well",
            "--encoder names the encoder whose latents these are, as in --encoder=dinov2-base; "
            "--decoder, --statistics and --vae name files or converted folders; or give --config",
        )
