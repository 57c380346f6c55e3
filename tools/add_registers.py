"""Adds diffusion registers to a denoiser that was trained without them, or removes them.

    python tools/add_registers.py --workdir=runs/baseline --gated --out=converted/with_registers
    python tools/add_registers.py --workdir=runs/digits --ablate --out=converted/without

--out becomes a folder like those of `python -m dsr_jax.convert`; commands that train or sample from
it are printed. The source is a run (its EMA weights) or, with --converted, another such folder.

New registers are initialized as in the paper, from N(0, 1) or with --scale, and change the output
of a trained network, since attention gives each of them some weight. With --gated the output is
unchanged at first: a learned gate per block and head, initialized to 0, interpolates between
attention without the registers and, at 1, the paper's attention. The original code has no gates, so
such a network cannot be exported to it. --compare=N measures both networks' loss on N batches.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dsr_jax import build
from dsr_jax.build.from_run import load_denoiser
from dsr_jax.config import ConfigDict
from dsr_jax.convert.files import load_converted, save_converted
from dsr_jax.convert.retrofit import add_registers, remove_registers
from dsr_jax.core.cli import make_parser, run_main
from dsr_jax.core.errors import ConfigError
from dsr_jax.core.rng import normal_per_sample, sample_keys, stream_key, uniform_per_sample
from dsr_jax.core.typing import Params
from dsr_jax.models.denoiser import Denoiser
from dsr_jax.models.registry import DENOISERS, denoiser_class, is_denoiser, model_sizes
from dsr_jax.models.transformer import DiffusionTransformer
from dsr_jax.parallel import shardings
from dsr_jax.training.step import to_unit_range

FIRST_BLOCKS = {12: 4, 24: 8, 28: 8}
"""First block with registers, by the depth."""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line `argv` (default: the process's)."""
    args = _parser().parse_args(argv)
    if args.compare and not args.workdir:
        raise ConfigError(
            "--compare needs the data and the objective of a run, which --converted lacks",
            "name the run with --workdir, or leave out --compare",
        )
    config = None
    if args.workdir:
        model, params, record, config = load_denoiser(args.workdir, args.checkpoint_step, args.ema)
    else:
        params, record = load_converted(args.converted)
        if not is_denoiser(record["family"]):
            raise ConfigError(
                f"{args.converted} holds a {record['family']}, which is not a denoiser",
                f"name the folder of a converted {', '.join(DENOISERS)}",
            )
        model = denoiser_class(record["family"])(**record["model"])
    if not isinstance(model, DiffusionTransformer):
        raise ConfigError(
            f"{record['family']} cannot have registers",
            "use a denoiser that is a dsr_jax.models.transformer.DiffusionTransformer",
        )
    if args.ablate:
        changed, more = remove_registers(model, params)
    else:
        changed, more = add_registers(
            model,
            params,
            args.registers,
            _start(model) if args.start is None else args.start,
            scale=args.scale,
            gate=args.gated,
            seed=args.seed,
        )
    save_converted(
        args.out,
        more,
        {
            **record,
            "model": model_sizes(changed),
            "retrofit": {
                "registers": [model.num_registers, changed.num_registers],
                "scale": args.scale,
                "seed": args.seed,
            },
        },
    )
    print(_next(args, changed))
    if config is not None and args.compare:
        losses = compare_losses(config, ((model, params), (changed, more)), args.compare)
        print(f"mean loss on {args.compare} batches: {losses[0]:.6g} before, {losses[1]:.6g} after")


def _start(model: DiffusionTransformer) -> int:
    """Returns the first block with registers: that of class tokens, or the paper's for a depth."""
    if getattr(model, "num_class_tokens", 0):
        return getattr(model, "class_token_start", 0)
    if model.depth not in FIRST_BLOCKS:
        raise ConfigError(
            f"the paper has no network of depth {model.depth}, so that --start has no default",
            "give --start, the first block that gets the registers",
        )
    return FIRST_BLOCKS[model.depth]


def compare_losses(
    config: ConfigDict,
    networks: Sequence[tuple[Denoiser, Params]],
    num_batches: int,
) -> list[float]:
    """Returns the mean losses of networks on the same images, times and noise.

    Labels are not dropped.

    Args:
      config: Config of a run, with all files of its input space.
      networks: Networks with their parameters.
      num_batches: Number of batches of the run's data.
    """
    mesh, rules = build.make_mesh(config), build.make_rules(config)
    space, variables = build.make_space(config, mesh)
    objective, time_sampler = build.make_objective(config), build.make_time_sampler(config)
    sharding = shardings.batch_sharding(mesh, rules)
    batches = build.global_batches(config, build.make_source(config, random_crops=True), sharding)

    def make_loss(model: Denoiser) -> Any:
        apply = build.make_denoise_fn(model, config.objective.prediction)

        @jax.jit
        def loss(params: Params, batch: Any, variables: Any) -> jax.Array:
            def keys(stream: str) -> jax.Array:
                return sample_keys(stream_key(config.seed, stream), batch["index"])

            x1 = space.encode(variables, to_unit_range(batch["image"]), keys("encode"))
            t = time_sampler(uniform_per_sample(keys("time")))
            x0 = normal_per_sample(keys("noise"), x1.shape[1:])
            network = lambda x, t: apply(params, x, t, batch["label"])  # noqa: E731
            return jnp.mean(objective.loss(network, x1, x0, t).loss)

        return loss

    losses = [make_loss(model) for model, _ in networks]
    sums = [0.0] * len(networks)
    for _, batch in zip(range(num_batches), batches(0), strict=False):
        for i, (_, params) in enumerate(networks):
            sums[i] += float(losses[i](params, batch, variables))
    return [total / num_batches for total in sums]


def _next(args: argparse.Namespace, model: DiffusionTransformer) -> str:
    """Returns a summary and the commands that use the folder."""
    source = f"{args.workdir}/config.json" if args.workdir else "CONFIG"
    keys = (
        f"--config={source} --config.registers.num={model.num_registers} "
        f"--config.registers.start={model.register_start} "
        f"--config.registers.gate={model.register_gate}"
    )
    return (
        f"{args.out}: {type(model).__name__} with {model.num_registers} registers; next\n"
        f"  python -m dsr_jax.train --workdir=NEW {keys} --config.train.init_from={args.out}\n"
        f"  python -m dsr_jax.sample --converted={args.out} {keys} --out=NEW"
    )


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--workdir", help="a run's folder")
    source.add_argument("--converted", help="folder that python -m dsr_jax.convert wrote")
    add("--out", required=True, help="new folder")
    add("--checkpoint-step", type=int, help="of a run; default: the newest")
    add("--ema", help="of a run: decay of the EMA weights, or none for the raw weights")
    add("--ablate", action="store_true", help="removes registers instead")
    add("--registers", type=int, default=36, help="number of registers, a square; default 36")
    add("--start", type=int, help="first block that sees them; default: the paper's")
    add("--scale", type=float, default=1.0, help="standard deviation of the tokens; default 1")
    add("--gated", action="store_true", help="with learned gates that are initially 0")
    add("--seed", type=int, default=0, help="seed of the new registers")
    add("--compare", type=int, default=0, metavar="N", help="with --workdir: losses on N batches")
    return parser


if __name__ == "__main__":
    run_main(main)
