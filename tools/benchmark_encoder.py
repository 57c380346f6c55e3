"""SigLIP2 for `tools/benchmark.py`: in JAX, in JAX with test-time registers, and in PyTorch."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from dsr_jax.convert.encoders import encoder_rules, take_encoder
from dsr_jax.convert.rules import torch_to_flax
from dsr_jax.models.intervention import Intervention
from dsr_jax.models.precision import Precision
from dsr_jax.models.variants import ENCODERS
from dsr_jax.models.vit import ViT, ViTConfig
from dsr_jax.registers.neurons import neurons_to_mask, published_neurons
from tools.benchmark_sides import channels_first, require_close

NAME = "siglip2-base-patch16-256"
TINY = {"image_size": 32, "hidden_size": 32, "depth": 2, "num_heads": 2, "mlp_dim": 64}


class EncoderSides:
    """Randomly initialized encoder as a JAX and as a PyTorch program, on the same images.

    Args:
      tiny: Whether to use a small network instead of SigLIP2-B.
      batch: Number of images.
      compute: Dtype of matmuls in ours.
    """

    def __init__(self, tiny: bool, batch: int, compute: str = "float32") -> None:
        sizes = ViTConfig(**ENCODERS[NAME])
        neurons = published_neurons(NAME)
        if tiny:
            sizes, neurons = dataclasses.replace(sizes, **TINY), {0: [3, 5], 1: [60]}
        self.sizes = sizes
        shape = (batch, sizes.image_size, sizes.image_size, 3)
        self._images = np.random.default_rng(0).standard_normal(shape, np.float32)
        self._torch = _make_torch(sizes)
        state = {name: value.numpy() for name, value in self._torch.state_dict().items()}
        rules = encoder_rules(sizes)
        self._params = jax.device_put(torch_to_flax(take_encoder(state, "siglip"), rules))
        self._pixels = jax.device_put(self._images)
        model = ViT(sizes, precision=Precision(compute))
        self._encode = jax.jit(lambda *args: model.apply({"params": args[0]}, *args[1:]).tokens)
        mask = neurons_to_mask(neurons, sizes.depth, sizes.mlp_dim)
        self._registers = jax.device_put(Intervention(mask=mask))

    def plain(self) -> Any:
        """Returns our tokens [B, T, D]."""
        return jax.block_until_ready(self._encode(self._params, self._pixels))

    def with_registers(self) -> Any:
        """Returns our tokens [B, T, D] with the published register neurons."""
        return jax.block_until_ready(self._encode(self._params, self._pixels, self._registers))

    def torch(
        self, device: str = "cpu", compiled: Callable[[Any], Any] = lambda function: function
    ) -> Callable[[], Any]:
        """Returns a function that computes PyTorch's tokens [B, T, D].

        Args:
          device: Device of the network, as PyTorch names it.
          compiled: Compiles the network's function.
        """
        import torch

        images, width = channels_first(self._images).to(device), self._torch.config.hidden_size
        network = self._torch.to(device)
        run = compiled(lambda x: network.encoder(inputs_embeds=network.embeddings(x)))

        def encode() -> Any:
            with torch.no_grad():
                hidden = run(images)
                return torch.nn.functional.layer_norm(hidden.last_hidden_state, (width,), eps=1e-6)

        return encode

    def check(self) -> None:
        """Checks that our tokens agree with PyTorch's.

        Raises:
          NumericsError: If they differ.
        """
        require_close("output", "tokens", self.plain(), self.torch()())


def _make_torch(sizes: ViTConfig) -> Any:
    """Returns transformers' network of the same sizes."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.SiglipVisionConfig(
        image_size=sizes.image_size,
        patch_size=sizes.patch_size,
        hidden_size=sizes.hidden_size,
        num_hidden_layers=sizes.depth,
        num_attention_heads=sizes.num_heads,
        intermediate_size=sizes.mlp_dim,
    )
    model = transformers.SiglipVisionModel(config).eval()
    # Releases before 5 wrap the network once more.
    return getattr(model, "vision_model", model)
