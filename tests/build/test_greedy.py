"""The language model's own answers against those that are given."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from dsr_jax import build
from dsr_jax import config as configs
from dsr_jax.build.prompts import make_prompt_tokenizer
from dsr_jax.core.prompts import IMAGE_SLOT
from dsr_jax.core.trees import flatten_names, unflatten_names

CONFIG = Path(__file__).parents[2] / "configs" / "shapes_t2i.py"
PROMPTS = ["a photo of a red square", "a cross", "a photo of two blue crosses"]


@pytest.mark.slow
def test_an_image_at_once_is_the_given_answer_and_other_words_never_end() -> None:
    config = configs.load(f"{CONFIG}:runlocal")
    config.language.tied, config.sample.batch = False, 2
    space, _ = build.make_space(config)
    model: Any = build.make_model(config, space)
    mesh = build.make_mesh(config, jax.devices()[:1])
    abstract = build.abstract_params(model, space, mesh, build.make_rules(config))
    flat = {name: np.zeros(x.shape, np.float32) for name, x in flatten_names(abstract).items()}
    # Hidden states are 1 everywhere, so that the table of logits alone decides the next token.
    for name in ("embed/embedding", "norm/scale"):
        flat[f"language/{name}"] += 1
    head = flat["language/head/kernel"]
    tokenizer = make_prompt_tokenizer("shapes")
    head[:, tokenizer.image_start_id] = 1
    compiled = build.greedy._likeliest._cache_size()
    given = build.encode_prompts(config, PROMPTS, model.num_slots)
    for _ in range(2):
        written = build.write_answers(config, model, unflatten_names(flat), PROMPTS)
        np.testing.assert_array_equal(written, given)
    assert build.greedy._likeliest._cache_size() == compiled + 1
    (word,) = tokenizer.text.encode("red")
    head[:, word] = 2
    written = build.write_answers(config, model, unflatten_names(flat), PROMPTS)
    assert not (written == IMAGE_SLOT).any()
    end = config.language.max_length - model.num_slots
    for row, prompt in zip(written, PROMPTS, strict=True):
        start = tokenizer.text.encode(prompt)
        assert row[: len(start)].tolist() == start
        assert (row[len(start) : end] == word).all() and (row[end:] == tokenizer.pad_id).all()
