"""Sources by hub id: which files are fetched, and the error without a network."""

from pathlib import Path
from typing import Any

import pytest

from dsr_jax.convert.fetch import fetch_snapshot
from dsr_jax.core.errors import ConversionError
from tests.requirements import require


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model-00001-of-00002.bin"])
def test_torch_files_are_fetched_only_without_safetensors(
    weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = require("huggingface_hub", "hub")
    asked = []

    def download(source: str, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        if any(Path(weights).match(pattern) for pattern in allow_patterns):
            (tmp_path / weights).touch()
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert fetch_snapshot("owner/name") == tmp_path
    assert (tmp_path / weights).exists()
    torch_files = weights.endswith(".bin")
    assert asked == [["*.json", "*.safetensors"], ["*.json", "*.bin"]][: 1 + torch_files]


def test_what_is_neither_a_file_nor_an_id_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = require("huggingface_hub", "hub")

    def offline(*args: Any, **options: Any) -> str:
        raise OSError("no route to host\ndetails")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    with pytest.raises(ConversionError, match="no route to host\n.*hf download owner/name"):
        fetch_snapshot("owner/name")
    for source in ("absent.safetensors", "./absent", "a/b/c"):
        with pytest.raises(ConversionError, match="does not exist and is no hub id"):
            fetch_snapshot(source)
