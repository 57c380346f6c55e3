"""A generator of images that renders what a prompt about shapes asks for, in place of a model."""

import numpy as np

from dsr_jax.data import shapes
from dsr_jax.data.shapes import Object, render


def scene_of(prompt, rng) -> shapes.Scene:
    """Returns a random scene that a prompt is true of."""
    while True:
        cells = [(int(n) // 3, int(n) % 3) for n in rng.permutation(9)]
        kinds = [c["class"] for c in prompt["include"] for _ in range(c["count"])]
        asked = [c.get("color") for c in prompt["include"] for _ in range(c["count"])]
        scene = [
            Object(color or str(rng.choice(list(shapes.PALETTE))), kind, cell)
            for kind, color, cell in zip(kinds, asked, cells, strict=False)
        ]
        if prompt["tag"] != "position":
            return tuple(scene)
        if shapes.relation(scene[1], scene[0], rng) == prompt["include"][1]["position"][0]:
            return tuple(scene)


PROMPTS = {
    line["prompt"]: line
    for split in shapes.NUM_SCENES
    for line in shapes.evaluation_prompts(split, 10_000)
}


def generate(prompts, seeds):
    """Returns images [B, 24, 24, 3] of prompts; each follows from its prompt and seed."""
    pairs = zip(prompts, seeds, strict=True)
    scenes = [scene_of(PROMPTS[text], np.random.default_rng(seed)) for text, seed in pairs]
    return np.stack([render(scene) for scene in scenes])


def gray(prompts, seeds):
    """Returns plain images [B, 8, 8, 3] whose level follows from the seed."""
    return np.stack([np.full((8, 8, 3), seed % 251, np.uint8) for seed in seeds])


gray.recipe = {"model": "gray"}


def floats(prompts, seeds):
    """Returns what no generator may return."""
    return np.zeros((len(prompts), 8, 8, 3))
