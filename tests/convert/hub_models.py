"""Random encoders of the hub's classes, saved as the hub's snapshots are."""

from pathlib import Path
from typing import Any

KINDS = (
    "siglip",
    "dinov2",
    "dinov2_with_registers",
    "dinov3_vit",
    "dinov3_vit_gated",
    "dinov3_vit_huge",
    "dinov3_vit_7b",
    "vit_mae",
)

DINOV3: dict[str, dict[str, Any]] = {
    "dinov3_vit": {},
    "dinov3_vit_gated": {"use_gated_mlp": True},
    "dinov3_vit_huge": {"use_gated_mlp": True, "hidden_act": "silu"},
    "dinov3_vit_7b": {
        "use_gated_mlp": True,
        "hidden_act": "silu",
        "query_bias": False,
        "value_bias": False,
    },
}
"""What distinguishes the kinds: ViT-H+ and 7B have SiLU, 7B no biases in attention's inputs."""


def save_snapshot(kind: str, folder: Path, **sizes: Any) -> None:
    """Saves a randomly initialized model and its config.json."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, **sizes}
    explicit = {"intermediate_size": 2 * sizes["hidden_size"]}
    if kind == "siglip":
        text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
        text |= {"num_attention_heads": 2, "vocab_size": 16, "bos_token_id": 1, "eos_token_id": 2}
        config = transformers.SiglipConfig(
            vision_config={"image_size": 64, **explicit, **sizes}, text_config=text
        )
        model: Any = transformers.SiglipModel(config)
    elif kind == "dinov2":
        model = transformers.Dinov2Model(transformers.Dinov2Config(image_size=70, **sizes))
    elif kind == "dinov2_with_registers":
        config = transformers.Dinov2WithRegistersConfig(image_size=70, patch_size=14, **sizes)
        model = transformers.Dinov2WithRegistersModel(config)
    elif kind.startswith("dinov3_vit"):
        config = transformers.DINOv3ViTConfig(
            num_register_tokens=4, **DINOV3[kind], **explicit, **sizes
        )
        model = transformers.DINOv3ViTModel(config)
    else:
        decoder = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        decoder |= {"intermediate_size": 16}
        config = transformers.ViTMAEConfig(
            image_size=64,
            **explicit,
            **sizes,
            **{f"decoder_{name}": value for name, value in decoder.items()},
        )
        model = transformers.ViTMAEForPreTraining(config)
    with torch.no_grad():
        # Zeros and ones at the start would hide a norm or bias that is left out.
        for parameter in model.parameters():
            if parameter.ndim < 2 or parameter.shape[0] == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
