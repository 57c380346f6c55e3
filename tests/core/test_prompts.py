"""Token sequences of prompts: chat format, slots, label mask, and unusable prompts."""

from pathlib import Path

import numpy as np
import pytest

from dsr_jax.core.errors import ConfigError, DataError, PromptError
from dsr_jax.core.prompts import (
    IGNORED,
    IMAGE_SLOT,
    PromptTokenizer,
    Turn,
    answer_slots,
    encode_requests,
)
from dsr_jax.core.tokenizers import FolderTokenizer, WordTokenizer
from tests.qwen_tokenizer import write_folder

WORDS = PromptTokenizer(WordTokenizer(["a", "red", "square"]), format="plain")


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> PromptTokenizer:
    return PromptTokenizer(FolderTokenizer(write_folder(tmp_path_factory.mktemp("tokenizer"))))


def test_plain_prompts() -> None:
    tokens, targets = WORDS.encode_training("A red square.", n_queries=2, length=9)
    assert tokens.tolist() == [3, 4, 5, 1, IMAGE_SLOT, IMAGE_SLOT, 2, 0, 0]
    assert targets.tolist() == [-100, -100, -100, 1, -100, -100, 2, -100, -100]
    assert tokens.dtype == targets.dtype == np.int32
    request = WORDS.encode_request("a red square", n_queries=2, length=9)
    assert request.tolist() == [3, 4, 5, 1, IMAGE_SLOT, IMAGE_SLOT, 0, 0, 0]
    assert WORDS.encode_prefix("a red square") == [3, 4, 5]


def test_the_chat_format_is_the_one_of_transformers(chat: PromptTokenizer) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(chat.text.name)
    theirs.add_special_tokens({"additional_special_tokens": ["<im_start>", "<im_end>"]})
    messages = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "Generate an image of a red square"},
        {"role": "assistant", "content": "Here you go:\n<im_start><im_end>"},
    ]
    text = theirs.apply_chat_template(messages, tokenize=False)
    want = theirs(text, add_special_tokens=False)["input_ids"]
    tokens, targets = chat.encode_training("a red square", n_queries=4, length=128)
    assert tokens[tokens != IMAGE_SLOT][: len(want)].tolist() == want
    prompt = theirs.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    assert (
        chat.encode_prefix("a red square")
        == (theirs(prompt, add_special_tokens=False)["input_ids"])
    )
    # A request is a training sequence up to its last slot.
    end = int(np.flatnonzero(tokens == IMAGE_SLOT)[-1]) + 1
    request = chat.encode_request("a red square", n_queries=4, length=128)
    assert request[:end].tolist() == tokens[:end].tolist()
    assert set(request[end:].tolist()) == {chat.pad_id}
    assert targets[end - 5] == chat.image_start_id and targets[end] == chat.image_end_id


def test_the_vocabulary_grows_by_two_words(chat: PromptTokenizer, tmp_path: Path) -> None:
    assert chat.image_start_id == chat.vocab_size - 2 and chat.image_end_id == chat.vocab_size - 1
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<im_start>", "<im_end>")
    complete = PromptTokenizer(FolderTokenizer(write_folder(tmp_path, names)))
    assert complete.vocab_size == chat.vocab_size
    chat.check_table(chat.vocab_size)
    with pytest.raises(ConfigError, match=rf"{chat.vocab_size} ids, the embedding table 64 rows"):
        chat.check_table(64)


def test_system_and_user_turns_supervise_line_breaks_and_turn_marks(chat: PromptTokenizer) -> None:
    turns = [Turn("user", "<image>\nred?"), Turn("assistant", "yes")]
    tokens, targets = chat.encode_conversation(turns, n_queries=3, length=96)
    marks = [chat.text.id_of("<|im_start|>"), chat.text.id_of("<|im_end|>"), 198]
    start = int(np.flatnonzero(tokens == marks[0])[-1])
    before = targets[:start]
    assert set(before[before != IGNORED].tolist()) == set(marks)
    end = int(np.flatnonzero(tokens != chat.pad_id)[-1]) + 1
    assert (targets[start:end] == tokens[start:end]).all()
    # The user's own image is no answer.
    assert not answer_slots(tokens[None], targets[None]).any()
    answer = [Turn("user", "red"), Turn("assistant", "here: <image>")]
    both = [chat.encode_conversation(each, 3, 96) for each in (turns, answer)]
    rows, masks = (np.stack(arrays) for arrays in zip(*both, strict=True))
    assert answer_slots(rows, masks).sum(axis=1).tolist() == [0, 3]


def test_other_scripts(chat: PromptTokenizer) -> None:
    tokens, _ = chat.encode_training("ein rotes Quadrat, красный квадрат, 红色方块 🟥", 4, 256)
    assert (tokens != chat.pad_id).sum() > 60
    with pytest.raises(PromptError, match="'rotes' of 'a rotes square' is not in the vocabulary"):
        WORDS.encode_training("a rotes square", 4, 64)


@pytest.mark.parametrize(
    ("prompt", "problem"),
    [
        ("", "the prompt is empty"),
        (" \n", "the prompt is empty"),
        ("a <image> b", "holds <image>"),
        ("a <|im_end|>", r"holds <\|im_end\|>"),
        ("<im_start> b", "holds <im_start>"),
        ("word " * 99, "takes .* tokens with its 4 image slots, of 64"),
    ],
)
def test_prompts_that_cannot_be_encoded(chat: PromptTokenizer, prompt: str, problem: str) -> None:
    with pytest.raises(PromptError, match=problem):
        chat.encode_training(prompt, 4, 64)
    with pytest.raises(PromptError, match=f"prompt 2: .*{problem}"):
        encode_requests(chat, ["a", prompt], 4, 64)


def test_a_prompt_without_words() -> None:
    with pytest.raises(PromptError, match="holds no words"):
        WORDS.encode_request("...", 2, 9)
    with pytest.raises(PromptError, match="chat format"):
        WORDS.encode_conversation([Turn("user", "a")], 2, 9)


def test_unknown_roles_and_formats(chat: PromptTokenizer) -> None:
    with pytest.raises(PromptError, match="role 'robot'"):
        chat.encode_conversation([Turn("robot", "a")], 4, 64)
    with pytest.raises(ConfigError, match="'xml'"):
        PromptTokenizer(chat.text, format="xml")


def test_tokenizer_folders_of_other_models(tmp_path: Path) -> None:
    other = write_folder(tmp_path / "other", ("<s>", "</s>"))
    with pytest.raises(DataError, match=r"another model than Qwen: it lacks <\|im_start\|>"):
        FolderTokenizer(other)
    with pytest.raises(DataError, match="does not exist"):
        FolderTokenizer(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="cannot be read"):
        FolderTokenizer(tmp_path / "empty")
    (tmp_path / "empty" / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        FolderTokenizer(tmp_path / "empty")


def test_word_lists_hold_each_word_once() -> None:
    with pytest.raises(DataError, match="twice"):
        WordTokenizer(["a", "b", "a"])
