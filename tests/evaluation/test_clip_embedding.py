"""CLIP beside transformers' own class and processor, through the commands that users run."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dsr_jax import evaluate_prompts
from dsr_jax.convert.__main__ import main as convert_main
from dsr_jax.convert.clip import clip_from_hub, load_clip
from dsr_jax.core.errors import ConversionError
from dsr_jax.core.tokenizers import read_tokenizer
from dsr_jax.evaluation.clip_embedding import PREFIX, embed

TEXTS = ["a photo of a cat", "two dogs, left of a house " * 12]


def write_hub_folder(folder: Path) -> Path:
    """Writes a small random CLIP and its tokenizer as save_pretrained does."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=270, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["a photo of a cat"], trainer)
    tokenizer.add_special_tokens(["<|startoftext|>", "<|endoftext|>"])
    start, end = (tokenizer.token_to_id(f"<|{name}oftext|>") for name in ("start", "end"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>",
        special_tokens=[("<|startoftext|>", start), ("<|endoftext|>", end)],
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|endoftext|>")
    fast.save_pretrained(str(folder))
    shared = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**shared, "intermediate_size": 24, "vocab_size": end + 1, "eos_token_id": end}
    vision = {**shared, "intermediate_size": 40, "image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    model = CLIPModel(
        CLIPConfig(
            text_config={**text, "max_position_embeddings": 20},
            vision_config=vision,
            projection_dim=12,
        )
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("clip")
    hub = write_hub_folder(root / "hub")
    convert_main(["clip", f"--source={hub}", f"--out={root / 'converted'}"])
    return hub, root / "converted"


@pytest.mark.slow
def test_embeddings_are_those_of_transformers(folders) -> None:
    import torch
    from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

    hub, converted = folders
    rng = np.random.default_rng(0)
    images = [
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
        for height, width in ((40, 30), (16, 50))
    ]
    network, params, _ = load_clip(converted)
    found = embed(network, params, read_tokenizer(converted), images, TEXTS, batch=3)
    model, theirs = CLIPModel.from_pretrained(hub).eval(), AutoTokenizer.from_pretrained(hub)
    size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    processor = CLIPImageProcessor(**size)
    pixels = processor(images, return_tensors="pt")["pixel_values"]
    rows = [
        theirs(PREFIX + text, padding="max_length", truncation=True, max_length=20)["input_ids"]
        for text in TEXTS
    ]
    # OpenAI's own tokenizer keeps the end of a text that is cut.
    tokens = torch.tensor(rows)
    tokens[:, -1] = network.end_id
    with torch.no_grad():
        out = model(input_ids=tokens, pixel_values=pixels)
    for ours, want in zip(found, (out.image_embeds, out.text_embeds), strict=True):
        normal = ours / np.linalg.norm(ours, axis=-1, keepdims=True)
        np.testing.assert_allclose(normal, want.numpy(), atol=2e-4)


@pytest.mark.slow
def test_the_score_of_a_folder(folders, tmp_path, capsys) -> None:
    _, converted = folders
    evaluate_prompts.main(
        [
            *("write", "shapes", "--per-task=1", "--images=2", f"--out={tmp_path / 'out'}"),
            "--generator=tests.shapes_generator:generate",
        ]
    )
    evaluate_prompts.main(["score", "clip", str(tmp_path / "out"), f"--clip={converted}"])
    found = json.loads((tmp_path / "out.scores.json").read_text())["scores"]
    assert found["n_images"] == 12 and found["clip"].endswith("hub")
    assert 0 <= found["clip_score"] <= 2.5 and -1 <= found["cosine"] <= 1
    assert "clip_score" in capsys.readouterr().out


@pytest.mark.slow
def test_export_gives_the_hub_file_back(folders, tmp_path) -> None:
    from safetensors.numpy import load_file

    hub, converted = folders
    out = tmp_path / "back.safetensors"
    convert_main(["export", f"--source={converted}", f"--out={out}"])
    want = load_file(hub / "model.safetensors")
    found = load_file(out)
    assert set(want) - set(found) <= {"logit_scale"}
    for name, array in found.items():
        np.testing.assert_array_equal(array, want[name])


def test_other_models_are_refused() -> None:
    with pytest.raises(ConversionError, match="'siglip', not CLIP"):
        clip_from_hub({"model_type": "siglip"})
    with pytest.raises(ConversionError, match="hidden_act='relu'"):
        clip_from_hub({"model_type": "clip", "text_config": {"hidden_act": "relu"}})
    assert clip_from_hub({"model_type": "clip"}).vision.hidden_size == 768
    old = clip_from_hub({"model_type": "clip", "text_config": {"eos_token_id": 2}})
    assert old.end_id == 49407
