"""The decoder that a run leaves as a converted folder."""

from pathlib import Path
from typing import Any

import pytest

from dsr_jax.config import base_config
from dsr_jax.runs import decoder_evaluation
from dsr_jax.runs.decoder_evaluation import Reconstructions


def test_the_decoder_of_a_run_that_went_back_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A complete run that is started again keeps its folder."""

    def save(folder: Path, sizes: Any, params: Any, record: dict[str, Any]) -> None:
        folder.mkdir()
        (folder / "params").write_text(params)

    monkeypatch.setattr(decoder_evaluation, "save_decoder", save)
    results = Reconstructions.__new__(Reconstructions)
    results.config, results._sizes = base_config(), None  # type: ignore[assignment]
    folder, found = tmp_path / "decoder_00000004", []
    for params, replace in (("first", True), ("second", True), ("third", False)):
        results._export(folder, params, 4, replace=replace)
        found.append((folder / "params").read_text())
    assert found == ["first", "second", "second"]
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
