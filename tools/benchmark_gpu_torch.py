"""The PyTorch side of `tools/benchmark.py gpu`: torch.compile, bfloat16 autocast, fused AdamW."""

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsr_jax.diffusion.samplers import time_grid
from tools.benchmark_encoder import EncoderSides
from tools.benchmark_gpu_jax import SAMPLE_POINTS
from tools.benchmark_gpu_side import Side
from tools.benchmark_sides import GUIDANCE, make_config
from tools.torch_reference import RandomInputs, TorchLightningDiT, Trainer, sample_euler


def prepare(row: str, args: argparse.Namespace) -> Side:
    """Returns PyTorch's side; `row` is a value of `benchmark_gpu.ROWS`."""
    torch.set_float32_matmul_precision("high")
    device = "cuda" if args.platform == "gpu" else "cpu"
    if row == "train":
        return _prepare_training(args, device)
    if row == "sample":
        return _prepare_sampling(args, device)
    return _prepare_encoder(args, device)


def _compiled(network: Callable[..., Any], device: str) -> Callable[..., Any]:
    """Returns the network under torch.compile and autocast, with float32 results."""
    # Without a GPU the dry run does without a C++ compiler, too.
    run: Any = torch.compile(network, backend="inductor" if device == "cuda" else "eager")

    def forward(*inputs: Tensor) -> Any:
        with torch.autocast(device, torch.bfloat16):
            out = run(*inputs)
        return out.float() if isinstance(out, Tensor) else out

    return forward


def _model(args: argparse.Namespace, device: str) -> TorchLightningDiT:
    """Returns the network with the weights that our side wrote."""
    config = make_config(args.size, args.batch, True, "")
    section = config.model
    model = TorchLightningDiT(
        input_size=config.data.image_size,
        patch_size=section.patch_size,
        in_channels=config.data.channels,
        hidden_size=section.hidden_size,
        depth=section.depth,
        num_heads=section.num_heads,
        mlp_ratio=section.mlp_ratio,
        num_classes=config.data.num_classes,
        num_registers=config.registers.num,
        register_start=config.registers.start,
    )
    with np.load(args.folder / "weights.npz") as weights:
        model.load_state_dict({name: torch.from_numpy(weights[name]) for name in weights.files})
    return model.to(device)


def _latents(array: np.ndarray, device: str) -> Tensor:
    """Converts [B, h, w, C] to a tensor [B, C, h, w]."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, -1, 1))).to(device)


def _prepare_training(args: argparse.Namespace, device: str) -> Side:
    model = _model(args, device)
    config = make_config(args.size, args.batch, True, "")
    trainer = Trainer(
        model,
        lr=config.optim.lr,
        betas=(config.optim.b1, config.optim.b2),
        ema_decay=config.ema.decays[0],
        label_dropout=config.objective.label_dropout,
        null_label=config.data.num_classes,
        forward=_compiled(model, device),
    )
    with np.load(args.folder / "train.npz") as given:
        x1 = _latents(given["batch_image"], device)
        labels = torch.from_numpy(given["batch_label"].astype(np.int64)).to(device)
        steps = [
            RandomInputs(
                torch.from_numpy(given[f"t{i}"]).to(device),
                _latents(given[f"noise{i}"], device),
                torch.from_numpy(given[f"labels{i}"].astype(np.int64)).to(device),
            )
            for i in range(sum(name.startswith("noise") for name in given.files))
        ]
    losses = [float(trainer.step(x1, labels, inputs)) for inputs in steps]
    return _side(lambda: trainer.step(x1, labels), device, args.batch, np.asarray(losses))


def _prepare_sampling(args: argparse.Namespace, device: str) -> Side:
    config = make_config(args.size, args.batch, True, "")
    model = _compiled(_model(args, device).eval(), device)
    with np.load(args.folder / "sample.npz") as given:
        noise = _latents(given["noise"], device)
        labels = torch.from_numpy(given["labels"].astype(np.int64)).to(device)
    points = 4 if args.size == "tiny" else SAMPLE_POINTS
    times = [float(t) for t in time_grid(points, "linear", "velocity")]

    def sample() -> Tensor:
        latents = sample_euler(model, noise, labels, times, GUIDANCE, config.data.num_classes)
        return ((0.5 + latents / 8).clamp(0, 1) * 255).to(torch.uint8)

    images = sample().permute(0, 2, 3, 1).cpu().numpy().astype(np.float32) - 127.5
    return _side(sample, device, args.images, images)


def _prepare_encoder(args: argparse.Namespace, device: str) -> Side:
    sides = EncoderSides(args.size == "tiny", args.images)
    encode = sides.torch(device, lambda network: _compiled(network, device))
    return _side(encode, device, args.images, encode().float().cpu().numpy())


def _side(call: Callable[[], Any], device: str, images: int, results: np.ndarray) -> Side:
    cuda = device == "cuda"

    def wait(_: Any) -> None:
        if cuda:
            torch.cuda.synchronize()

    def figures() -> dict[str, Any]:
        return {
            "images": images,
            "device": torch.cuda.get_device_name() if cuda else "cpu",
            "peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
            "versions": {"torch": torch.__version__},
        }

    return Side(call, wait, figures, results)
