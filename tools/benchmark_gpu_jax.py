"""The JAX side of `tools/benchmark.py gpu`: it also writes the weights and inputs of the other."""

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from dsr_jax import build
from dsr_jax.core.rng import normal_per_sample, sample_keys, stream_key
from dsr_jax.telemetry.flops import train_step_flops
from tools.benchmark_encoder import EncoderSides
from tools.benchmark_sides import GUIDANCE, Ours, make_config, to_torch

Result = tuple[dict[str, Any], np.ndarray]
SAMPLE_POINTS = 50
CHECKED_STEPS = 2


def run(row: str, args: argparse.Namespace) -> Result:
    """Runs our side of a row; returns figures and what must agree with PyTorch."""
    jax.config.update("jax_default_matmul_precision", "default")
    if row in ("encoder", "ttr"):
        return _run_encoder(row, args)
    config = make_config(args.size, args.batch, True, args.remat)
    config.precision.compute = "bfloat16"
    config.precision.residual = args.residual or config.precision.residual
    points = 4 if args.size == "tiny" else SAMPLE_POINTS
    config.sample.num_points, config.sample.guidance = points, GUIDANCE
    ours = Ours(config)
    ours.start()
    path = args.folder / "weights.npz"
    np.savez(path, **to_torch(ours, ours.state.params))
    return _run_training(ours, args) if row == "train" else _run_sampling(ours, args)


def _run_training(ours: Ours, args: argparse.Namespace) -> Result:
    inputs: dict[str, Any] = {}
    losses, ends = [], [time.perf_counter()]
    for i in range(CHECKED_STEPS):
        times, noise, labels = ours.random_inputs()
        inputs |= {f"t{i}": times, f"noise{i}": noise, f"labels{i}": labels}
        losses.append(ours.train())
        ends.append(time.perf_counter())
    first = ends[1] - ends[0]
    given = {f"batch_{name}": value for name, value in ours.batch.items()}
    np.savez(args.folder / "train.npz", **{k: np.asarray(v) for k, v in (inputs | given).items()})

    def step() -> Any:
        ours.state, metrics = ours.step(ours.state, ours.batch, ours.variables)
        return metrics

    flops = train_step_flops(ours.model.forward_flops(), args.batch)
    return _figures(step, args, first, args.batch, flops), np.asarray(losses)


def _run_sampling(ours: Ours, args: argparse.Namespace) -> Result:
    config, count = ours.config, args.images
    indices = np.arange(count)
    labels = indices % config.data.num_classes
    sampler = build.make_sampler(config, ours.model, ours.space, ours.mesh, ours.rules)
    params = ours.state.params
    # The state's other parts are training's.
    ours.state = ours.state.replace(opt_state=None, ema={})
    key = stream_key(config.sample.seed, "sample_noise")
    noise = normal_per_sample(sample_keys(key, indices), ours.space.latent_shape)
    np.savez(args.folder / "sample.npz", noise=np.asarray(noise), labels=labels)

    def sample() -> Any:
        return sampler(params, {}, indices, labels).images

    start = time.perf_counter()
    images = np.asarray(sample())
    first = time.perf_counter() - start
    flops = 2 * (config.sample.num_points - 1) * count * ours.model.forward_flops()
    return _figures(sample, args, first, count, flops), images.astype(np.float32) - 127.5


def _run_encoder(row: str, args: argparse.Namespace) -> Result:
    sides = EncoderSides(args.size == "tiny", args.images, "bfloat16")
    start = time.perf_counter()
    tokens = np.asarray(sides.plain(), np.float32)
    first = time.perf_counter() - start
    call = sides.plain
    if row == "ttr":
        start = time.perf_counter()
        sides.with_registers()
        first, call = time.perf_counter() - start, sides.with_registers
    sizes = sides.sizes
    length = (sizes.image_size // sizes.patch_size) ** 2
    macs = sizes.depth * _encoder_block_macs(length, sizes.hidden_size, sizes.mlp_dim)
    macs += length * 3 * sizes.patch_size**2 * sizes.hidden_size
    return _figures(call, args, first, args.images, 2 * macs * args.images), tokens


def _encoder_block_macs(length: int, width: int, hidden: int) -> int:
    """Returns the multiply-accumulates of a block without modulation, on one image."""
    return length * (4 * width**2 + 2 * width * hidden) + 2 * length**2 * width


def _figures(
    call: Callable[[], Any], args: argparse.Namespace, first: float, images: int, flops: int
) -> dict[str, Any]:
    def timed() -> float:
        start = time.perf_counter()
        for _ in range(args.calls):
            result = call()
        jax.block_until_ready(result)
        return (time.perf_counter() - start) / args.calls

    device = jax.devices()[0]
    seconds = min(timed() for _ in range(args.rounds))
    memory = device.memory_stats() or {}
    return {
        "seconds": seconds,
        "first_seconds": first,
        "images": images,
        "flops": flops,
        "device": device.device_kind,
        "peak_bytes": memory.get("peak_bytes_in_use"),
        "versions": {"jax": jax.__version__},
    }
