"""Checkpoints as users bring them, through the command: wrapped, sharded, with more in them."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dsr_jax.convert.__main__ import main
from dsr_jax.convert.files import load_converted
from dsr_jax.core.errors import ConversionError
from dsr_jax.core.files import file_digest
from tests.requirements import require

WEIGHTS = Path(__file__).parent.parent / "golden" / "denoiser_sit_tiny" / "weights.safetensors"
STATE = load_file(WEIGHTS)


def convert(source: Path, out: Path, *more: str, family: str = "sit") -> dict:
    """Converts a file; returns the record."""
    main([family, f"--source={source}", f"--out={out}", "--num-heads=3", *more])
    return load_converted(out)[1]


@pytest.fixture(scope="module")
def digest(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the golden weights become."""
    record = convert(WEIGHTS, tmp_path_factory.mktemp("converted") / "out")
    assert (record["entry"], record["dropped"]) == (None, [])
    return record["params_digest"]


def before(prefix: str, factor: float = 1.0) -> dict[str, np.ndarray]:
    return {prefix + name: x * np.float32(factor) for name, x in STATE.items()}


def inside(word: str) -> dict[str, np.ndarray]:
    """Names as a wrapper around each block makes them."""
    return {name.replace(".", f".{word}.", 2).replace(f".{word}.", ".", 1): STATE[name]
            if name.startswith("blocks.") else STATE[name] for name in STATE}  # fmt: skip


CASES = {
    "ddp_of_compiled": ({"ema": before("module._orig_mod.")}, "ema"),
    "compiled_blocks": ({"ema": inside("_orig_mod")}, "ema"),
    "checkpointed_blocks": ({"ema": inside("_checkpoint_wrapped_module")}, "ema"),
    "fsdp": ({"model": before("_fsdp_wrapped_module.")}, "model"),
    "fabric": ({"model": before("_forward_module.")}, "model"),
    "deepspeed": ({"module": before("module.")}, "module"),
    "lightning": ({"state_dict": before("model.")}, "state_dict.model"),
    "lightning_with_ema": (
        {"state_dict": before("model.", 2) | before("ema_model.")},
        "state_dict.ema_model",
    ),
    "ema_pytorch": (
        before("online_model.", 2)
        | before("ema_model.")
        | {"step": np.array(5), "initted": np.array(True)},
        "ema_model",
    ),
    "averaged_model": ({"ema": before("module.") | {"n_averaged": np.array(7)}}, "ema"),
    "model_beside_ema": ({"model": before("", 2), "ema": before("")}, "ema"),
}


@pytest.mark.parametrize("case", CASES)
def test_wrapped_weights_are_found(case: str, digest: str, tmp_path: Path) -> None:
    torch = require("torch", "torch")
    content, entry = CASES[case]

    def tensors(value: object) -> object:
        if isinstance(value, dict):
            return {name: tensors(x) for name, x in value.items()}
        return torch.from_numpy(np.asarray(value))

    torch.save(tensors(content), tmp_path / "x.pt")
    record = convert(tmp_path / "x.pt", tmp_path / "out")
    assert (record["params_digest"], record["entry"]) == (digest, entry)


def test_an_asked_network_is_taken_from_below_its_attribute(digest: str, tmp_path: Path) -> None:
    torch = require("torch", "torch")
    content = before("ema_model.", 2) | before("online_model.")
    torch.save({name: torch.from_numpy(x) for name, x in content.items()}, tmp_path / "x.pt")
    record = convert(tmp_path / "x.pt", tmp_path / "out", "--entry=online_model")
    assert (record["params_digest"], record["entry"]) == (digest, "online_model")
    with pytest.raises(ConversionError, match="no entry 'ema'\n.*ema_model, online_model"):
        convert(tmp_path / "x.pt", tmp_path / "other", "--entry=ema")


@pytest.mark.parametrize("stem", ["model", "diffusion_pytorch_model", "transformer"])
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards_under_any_name(stem: str, suffix: str, digest: str, tmp_path: Path) -> None:
    folder, names = tmp_path / "sharded", list(STATE)
    folder.mkdir()
    files = [f"{stem}-0000{i}-of-00002.{suffix}" for i in (1, 2)]
    for file, part in zip(files, (names[:20], names[20:]), strict=True):
        arrays = {name: STATE[name] for name in part}
        if suffix == "bin":
            torch = require("torch", "torch")
            torch.save({name: torch.from_numpy(x) for name, x in arrays.items()}, folder / file)
        else:
            save_file(arrays, folder / file)
    index = {"weight_map": {name: files[number >= 20] for number, name in enumerate(names)}}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    assert convert(folder, tmp_path / "out")["params_digest"] == digest
    by_index = convert(folder / f"{stem}.{suffix}.index.json", tmp_path / "again")
    assert by_index["params_digest"] == digest
    (folder / files[1]).unlink()
    with pytest.raises(ConversionError, match=f"lacks .*{files[1]}"):
        convert(folder, tmp_path / "lacking")


def test_training_heads_are_dropped_by_the_flag_that_the_error_names(
    digest: str, tmp_path: Path
) -> None:
    source = tmp_path / "repa.safetensors"
    save_file({**STATE, "projectors.0.0.weight": np.zeros((4, 4), np.float32)}, source)
    with pytest.raises(ConversionError, match=r"projectors\.0\.0\.weight") as caught:
        convert(source, tmp_path / "out")
    assert "--drop 'projectors.*'" in caught.value.remedy
    record = convert(source, tmp_path / "out", "--drop", "projectors.*")
    assert (record["params_digest"], record["dropped"]) == (digest, ["projectors.*"])
    with pytest.raises(ConversionError, match="names no tensor"):
        convert(source, tmp_path / "other", "--drop", "projector.*")


@pytest.mark.parametrize(
    ("value", "dtype", "problem", "remedy"),
    [
        (1.0, ml_dtypes.float8_e4m3fn, "float8_e4m3fn", "float32, bfloat16 or float16"),
        (1.0, np.int8, "int8", "float32, bfloat16 or float16"),
        (np.inf, np.float16, r"1 of \d+ numbers \(float16\)", "float32 or bfloat16"),
        (np.nan, np.float32, r"1 of \d+ numbers \(float32\)", "earlier checkpoint"),
        (np.nan, ml_dtypes.bfloat16, r"1 of \d+ numbers \(bfloat16\)", "earlier checkpoint"),
    ],
)
def test_invalid_values_are_rejected(
    value: float, dtype: type, problem: str, remedy: str, tmp_path: Path
) -> None:
    name = "blocks.1.mlp.fc1.weight"
    wrong = np.ones(STATE[name].shape, dtype)
    wrong[2, 1] = value
    save_file({**STATE, name: wrong}, tmp_path / "x.safetensors")
    with pytest.raises(ConversionError, match=rf"{name}.*{problem}") as caught:
        convert(tmp_path / "x.safetensors", tmp_path / "out")
    assert remedy in caught.value.remedy
    assert not (tmp_path / "out").exists()


def test_half_precision_is_widened(tmp_path: Path) -> None:
    half = {name: x.astype(ml_dtypes.bfloat16) for name, x in STATE.items()}
    save_file(half, tmp_path / "half.safetensors")
    save_file({n: x.astype(np.float32) for n, x in half.items()}, tmp_path / "wide.safetensors")
    digests = {
        convert(tmp_path / f"{name}.safetensors", tmp_path / name)["params_digest"]
        for name in ("half", "wide")
    }
    assert len(digests) == 1


def test_arguments_are_looked_at_before_the_file(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept").write_text("kept")
    with pytest.raises(ConversionError, match="out is not an empty folder"):
        convert(tmp_path / "absent.pt", tmp_path / "out")
    with pytest.raises(ConversionError, match="this is SiT, not LightningDiT\n.*convert sit"):
        convert(WEIGHTS, tmp_path / "other", family="lightningdit")
    assert file_digest(WEIGHTS) == convert(WEIGHTS, tmp_path / "new")["source_digest"]
