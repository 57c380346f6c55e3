"""Caption files: tar shards, jsonl, pairs; their order, exact resume, and broken records."""

import io
import json
import logging
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dsr_jax.core.errors import ConfigError, DataError, UnreadableRecord
from dsr_jax.core.prompts import PromptTokenizer, Turn
from dsr_jax.core.tokenizers import FolderTokenizer
from dsr_jax.data.classes import describe, read_class_names, write_class_names
from dsr_jax.data.pipeline import make_batches
from dsr_jax.data.sources import make_caption_source
from dsr_jax.data.tar_captions import read_index
from tests.qwen_tokenizer import write_folder

LENGTH, SLOTS = 96, 4


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> PromptTokenizer:
    return PromptTokenizer(FolderTokenizer(write_folder(tmp_path_factory.mktemp("tokenizer"))))


def png(level: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), level, np.uint8)).save(file, "PNG")
    return file.getvalue()


def conversation(text: str, answer: str = "Here you go:\n<image>") -> dict:
    return {
        "conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": answer}],
        "metadata": {"from": "a test"},
    }


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def shard(path: Path, numbers, **more: bytes) -> Path:
    """Writes a shard of whole samples, whose gray level is their number, and further members."""
    files: dict[str, bytes] = {}
    for number in numbers:
        files[f"{number:04d}.png"] = png(number)
        files[f"{number:04d}.json"] = json.dumps(conversation(f"Draw {number}")).encode()
    return write_tar(path, files | more)


def open_source(kind: str, root: Path, tokenizer: PromptTokenizer, **more):
    options = {"image_size": 8, "channels": 3, "root": str(root)} | more
    return make_caption_source(kind, tokenizer, SLOTS, LENGTH, **options)


def text_of(tokenizer: PromptTokenizer, record) -> str:
    tokens = record["tokens"]
    kept = tokens[(tokens >= 0) & (tokens != tokenizer.pad_id)]
    return tokenizer.text._tokenizer.decode(kept.tolist())  # type: ignore[attr-defined]


def test_tar_shards(tmp_path: Path, chat: PromptTokenizer) -> None:
    shard(tmp_path / "b.tar", [7, 5])
    shard(tmp_path / "a.tar", [1, 2, 3])
    source = open_source("webdataset", tmp_path, chat)
    levels = [int(source[index]["image"][0, 0, 0]) for index in range(len(source))]
    assert levels == [1, 2, 3, 5, 7]
    assert "user\nDraw 5" in text_of(chat, source[3])
    want = chat.encode_conversation(
        [Turn("user", "Draw 5"), Turn("assistant", "Here you go:\n<image>")],
        SLOTS,
        LENGTH,
    )
    np.testing.assert_array_equal(source[3]["targets"], want[1])
    manifest = tmp_path / "manifest.json"
    manifest.write_text(json.dumps({"dataset_name": "x", "tars": ["b.tar", "a.tar"]}))
    listed = open_source("webdataset", manifest, chat)
    assert [int(listed[i]["image"][0, 0, 0]) for i in range(5)] == [5, 7, 1, 2, 3]
    assert listed.fingerprint != source.fingerprint
    manifest.write_text(json.dumps({"tars": ["b.tar", "c.tar"]}))
    with pytest.raises(DataError, match=r"1 of 2 tar shards do not exist, the first .*c\.tar"):
        open_source("webdataset", manifest, chat)
    manifest.write_text("[]")
    with pytest.raises(DataError, match='no list of paths under "tars"'):
        open_source("webdataset", manifest, chat)


def test_the_index_of_a_shard_is_made_once(tmp_path: Path, monkeypatch) -> None:
    path = shard(tmp_path / "a.tar", [1, 2])
    first = read_index(path)
    with monkeypatch.context() as patch:
        patch.setattr("dsr_jax.data.tar_captions.scan_shard", lambda path: pytest.fail("scanned"))
        np.testing.assert_array_equal(read_index(path).entries, first.entries)
    stored = tmp_path / "a.tar.index.npz"
    stored.write_bytes(b"damaged")
    np.testing.assert_array_equal(read_index(path).entries, first.entries)
    shard(path, [1, 2, 3])
    assert len(read_index(path).entries) == 3
    content = path.read_bytes()
    path.write_bytes(content[:700])
    with pytest.raises(DataError, match="is not a whole tar file"):
        read_index(path)


def test_a_damaged_header_does_not_end_a_shard_early(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", [1, 2, 3])
    content = bytearray(path.read_bytes())
    where = content.index(b"0003.png")
    content[where : where + 8] = b"damaged!"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"the header at byte {where} is damaged"):
        read_index(path)


def test_batches_resume_at_their_position(tmp_path: Path, chat: PromptTokenizer) -> None:
    for number in range(3):
        shard(tmp_path / f"{number}.tar", range(number * 4, number * 4 + 4))
    source = open_source("webdataset", tmp_path, chat)
    whole = make_batches(source, 3, 4)
    batches = [next(whole) for _ in range(5)]
    epoch = np.concatenate([batch["image"][:, 0, 0, 0] for batch in batches[:3]])
    assert sorted(epoch.tolist()) == list(range(12)) and epoch.tolist() != sorted(epoch.tolist())
    again = open_source("webdataset", tmp_path, chat)
    resumed = next(make_batches(again, 3, 4, start_step=4, rows=[0, 2]))
    for name, array in resumed.items():
        np.testing.assert_array_equal(array, batches[4][name][[0, 2]])


@pytest.mark.slow
def test_reader_processes_give_the_same_batches(tmp_path: Path, chat: PromptTokenizer) -> None:
    shard(tmp_path / "a.tar", range(12))
    source = open_source("webdataset", tmp_path, chat)
    here, there = (make_batches(source, 3, 4, workers=workers) for workers in (0, 2))
    for _ in range(4):
        ours, theirs = next(here), next(there)
        for name, array in ours.items():
            np.testing.assert_array_equal(array, theirs[name])


BROKEN = {
    "bad.png": png(0),
    "bad.json": b"{",
    "lonely.png": png(0),
    "silent.json": json.dumps(conversation("x")).encode(),
    "understood.png": png(0),
    "understood.json": json.dumps(conversation("<image>\nWhat?", "a cat")).encode(),
    "twice.png": png(0),
    "twice.json": json.dumps(conversation("x", "<image> and <image>")).encode(),
    "empty.png": png(0),
    "empty.txt": b" \n",
    "other.png": png(0),
    "other.json": json.dumps({"conversations": [{"from": "robot", "value": "x"}]}).encode(),
}


def test_broken_samples_of_a_shard(tmp_path: Path, chat: PromptTokenizer, caplog) -> None:
    path = shard(tmp_path / "a.tar", [1, 2], **BROKEN)
    with pytest.raises(DataError, match=r"7 of 9 records of .*a\.tar: bad\.json is no JSON"):
        open_source("webdataset", path, chat)
    problems = "\n".join(read_index(path).problems)
    for problem in (
        "lonely has an image, but no caption",
        "silent has a caption, but no image",
        "understood.json has 0 <image> in its answers and 1 elsewhere",
        "twice.json has 2 <image> in its answers",
        "empty.txt the caption is empty",
        "other.json turn 1 lacks",
    ):
        assert problem in problems
    with caplog.at_level(logging.WARNING):
        source = open_source("webdataset", path, chat, on_corrupt="skip")
    assert len(source) == 2 and "skipped 7 of 9 records" in caplog.text
    description = describe(source)
    assert description["skipped"] == 7
    write_class_names(tmp_path, description)
    assert read_class_names(tmp_path) == description
    only = write_tar(tmp_path / "b.tar", BROKEN)
    with pytest.raises(DataError, match="7 of 7 records"):
        open_source("webdataset", only, chat, on_corrupt="skip")


def test_captions_as_img2dataset_writes_them(tmp_path: Path, chat: PromptTokenizer) -> None:
    files = {"1.jpg": png(9), "1.txt": b"a cat", "1.json": b'{"caption": "a dog", "status": "ok"}'}
    files |= {"2.jpg": png(8), "2.txt": b"a cow", "2.json": b'{"status": "ok"}'}
    source = open_source("webdataset", write_tar(tmp_path / "a.tar", files), chat)
    assert "Generate an image of a dog" in text_of(chat, source[0])
    assert "Generate an image of a cow" in text_of(chat, source[1])


def write_jsonl(folder: Path, lines: list[str]) -> Path:
    for number in range(3):
        (folder / f"{number}.png").write_bytes(png(number))
    path = folder / "captions.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_jsonl(tmp_path: Path, chat: PromptTokenizer) -> None:
    lines = [
        json.dumps({"image": "2.png", **conversation("Zeichne drei Äpfel")}, ensure_ascii=False),
        "",
        json.dumps({"image": ["0.png"], "caption": "a cat"}),
    ]
    source = open_source("jsonl", write_jsonl(tmp_path, lines), chat)
    assert [int(source[index]["image"][0, 0, 0]) for index in range(2)] == [2, 0]
    assert "Zeichne drei Äpfel" in text_of(chat, source[0])
    assert "Generate an image of a cat" in text_of(chat, source[1])
    phrases = ("Draw {}", "{} please")
    varied = open_source("jsonl", tmp_path / "captions.jsonl", chat, requests=phrases)
    assert "user\na cat please" in text_of(chat, varied[1])
    with pytest.raises(ConfigError, match="no single {}"):
        open_source("jsonl", tmp_path / "captions.jsonl", chat, requests=("Draw",))


def test_broken_lines_are_named(tmp_path: Path, chat: PromptTokenizer, caplog) -> None:
    lines = [
        json.dumps({"image": "0.png", "caption": "fine"}),
        '{"image": "0.png", "caption"',
        json.dumps({"image": "missing.png", "caption": "x"}),
        json.dumps({"caption": "x"}),
        "[1]",
        json.dumps({"image": ["0.png", "1.png"], "caption": "x"}),
        json.dumps({"image": "0.png"}),
        json.dumps({"image": 3, "caption": "x"}),
    ]
    path = write_jsonl(tmp_path, lines)
    with pytest.raises(DataError) as caught:
        open_source("jsonl", path, chat)
    for problem in (
        "7 of 8 records",
        "line 2 is no JSON",
        "line 3 names missing.png, which does not exist",
        "line 4 names no image",
        "line 5 is no JSON object",
        "line 6 names 2 images",
        "and 2 more",
    ):
        assert problem in str(caught.value)
    source = open_source("jsonl", path, chat, on_corrupt="skip")
    assert len(source) == 1 and describe(source)["skipped"] == 7
    # What the error says helps: with the image, the line can be used.
    (tmp_path / "missing.png").write_bytes(png(5))
    assert len(open_source("jsonl", path, chat, on_corrupt="skip")) == 2
    with pytest.raises(DataError, match="cannot be read"):
        open_source("jsonl", tmp_path / "none.jsonl", chat)
    path.write_text("")
    with pytest.raises(DataError, match="holds no captioned images"):
        open_source("jsonl", path, chat)


def test_records_that_show_their_problem_when_read(tmp_path, chat, caplog) -> None:
    lines = [
        json.dumps({"image": "0.png", "caption": "word " * 200}),
        json.dumps({"image": "1.png", "caption": "an <|im_end|> inside"}),
        json.dumps({"image": "2.png", "caption": "fine"}),
        json.dumps({"image": "torn.png", "caption": "fine"}),
    ]
    path = write_jsonl(tmp_path, lines)
    (tmp_path / "torn.png").write_bytes(png(1)[:40])
    source = open_source("jsonl", path, chat)
    for index, problem in ((0, "line 1 of .* takes"), (1, "line 2 of .* holds"), (3, "torn.png")):
        with pytest.raises(UnreadableRecord, match=problem):
            source[index]
    skipping = open_source("jsonl", path, chat, on_corrupt="skip")
    with caplog.at_level(logging.WARNING):
        levels = [int(skipping[index]["image"][0, 0, 0]) for index in range(4)]
    assert levels == [2, 2, 2, 2]
    assert caplog.text.count("skipped:") == 3


def test_folders_of_pairs(tmp_path: Path, chat: PromptTokenizer) -> None:
    (tmp_path / "inner").mkdir()
    for name, level in (("b", 2), ("inner/a", 1), ("empty", 0)):
        (tmp_path / f"{name}.png").write_bytes(png(level))
        (tmp_path / f"{name}.txt").write_text(f"caption {name}" if name != "empty" else " ")
    source = open_source("captions", tmp_path, chat)
    assert "a caption inner/a" not in text_of(chat, source[2])
    assert "Generate an image of caption inner/a" in text_of(chat, source[2])
    with pytest.raises(UnreadableRecord, match=r"empty\.txt: the caption is empty"):
        source[1]
    (tmp_path / "lonely.png").write_bytes(png(3))
    (tmp_path / "silent.txt").write_text("x")
    with pytest.raises(DataError, match=r"lonely\.png has no caption file; silent\.txt has no"):
        open_source("captions", tmp_path, chat)
    assert describe(open_source("captions", tmp_path, chat, on_corrupt="skip"))["skipped"] == 2
    with pytest.raises(DataError, match="does not exist"):
        open_source("captions", tmp_path / "none", chat)


def test_unknown_sources(tmp_path: Path, chat: PromptTokenizer) -> None:
    with pytest.raises(DataError, match="no source of captions is called 'parquet'"):
        open_source("parquet", tmp_path, chat)
