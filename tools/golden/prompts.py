"""Golden cases of prompts: token sequences, label mask, image slots."""

import numpy as np

from dsr_jax.core.prompts import (
    IGNORED,
    IMAGE_SLOT,
    PromptTokenizer,
    Turn,
    answer_slots,
    encode_requests,
)
from dsr_jax.core.tokenizers import FolderTokenizer
from tools.golden.compare import Case, Check

_ROLES = {"human": "user", "gpt": "assistant"}


def run_prompt(case: Case) -> list[Check]:
    """Compares conversations before and after slots are repeated, slot positions, and requests."""
    config, io = case.config, case.io
    text = FolderTokenizer(case.path)
    tokenizer = PromptTokenizer(text, request="{}")
    slots, length = config["tokens_per_image"], config["max_length"]
    checks = [
        Check(word, text.encode("\n" if word == "newline" else word), [want], "exact")
        for word, want in config["special_ids"].items()
    ]
    rows = []
    for number, conversation in enumerate(config["conversations"]):
        turns = [Turn(_ROLES[turn["from"]], turn["value"]) for turn in conversation]
        tokens, targets = tokenizer.encode_turns(turns)
        # The labels before the slots are repeated hold the id of the reference's own <image> word.
        want = [t if t < text.vocab_size else IGNORED for t in config["raw_labels"][number]]
        checks.append(Check(f"raw ids {number}", tokens, config["raw_ids"][number], "exact"))
        checks.append(Check(f"raw labels {number}", targets, want, "exact"))
        rows.append(tokenizer.encode_conversation(turns, slots, length))
    tokens, targets = (np.stack(arrays) for arrays in zip(*rows, strict=True))
    is_slot, answers = tokens == IMAGE_SLOT, answer_slots(tokens, targets)
    # The reference inserts images by gathering from the text's rows followed by the images'.
    order = np.cumsum(is_slot, axis=1) - 1
    gathered = np.where(is_slot, length + order, np.arange(length))
    positions = np.stack([np.flatnonzero(row) for row in is_slot]) + slots
    pads = tokens != tokenizer.pad_id
    pairs = (
        ("input_ids", tokens),
        ("labels", targets),
        ("attention_mask", pads),
        ("answer_token_mask", answers),
        ("answer_img_mask", answers.any(axis=1, keepdims=True)),
        ("vision_token_indices", gathered),
        ("reverse_vti", positions),
    )
    checks += [Check(name, found, io[name], "exact") for name, found in pairs]
    return checks + _requests(case, tokenizer)


def _requests(case: Case, tokenizer: PromptTokenizer) -> list[Check]:
    """Compares the tokens before an answer, and requests with the training sequences' start."""
    config, io = case.config, case.io
    lengths = io["inference_prompt_lengths"]
    expected = np.split(io["inference_prompt_ids"], np.cumsum(lengths)[:-1])
    questions = [
        text.split("user\n")[1].split("<|im_end|>")[0] for text in config["inference_prompts"]
    ]
    checks = [
        Check(f"prefix {number}", tokenizer.encode_prefix(question), want, "exact")
        for number, (question, want) in enumerate(zip(questions, expected, strict=True))
    ]
    slots, length = config["tokens_per_image"], config["max_length"]
    found = encode_requests(tokenizer, questions, slots, length)
    for number, row in enumerate(io["input_ids"]):
        if io["answer_img_mask"][number].any():
            end = int(np.flatnonzero(row == config["image_placeholder"])[-1]) + 1
            checks.append(Check(f"request {number}", found[number, :end], row[:end], "exact"))
    return checks


RUNNERS = {"t2i_prompt*": (run_prompt, lambda config: "raw_labels" in config)}
