"""Prints the summary of an experiment: sizes, cost, memory and schedule of a config.

    python tools/describe.py --config=configs/rae_dit.py --config.mesh.fsdp=8 --chips=8

No array is allocated, so it takes seconds for any model size, on any machine. Files that the config
names need not exist: sizes are then those of the networks that the folders are named after. Any
config key can be overridden on the command line. `--json` prints the numbers for programs.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jax.sharding import AbstractMesh, AxisType

from dsr_jax import build
from dsr_jax import config as configs
from dsr_jax.build.abstract import abstract_batch, abstract_decoder_parts, abstract_space
from dsr_jax.core.cli import make_parser, positive_int, run_main
from dsr_jax.core.trees import count_params, tree_bytes
from dsr_jax.models.denoiser import Denoiser
from dsr_jax.parallel.axes import MESH_AXES, Constrain
from dsr_jax.parallel.mesh import MeshShape, check_batch
from dsr_jax.planning.memory import GIB, bytes_per_chip
from dsr_jax.spaces import InputSpace
from dsr_jax.telemetry import flops
from dsr_jax.telemetry.parameters import parameter_table

IMAGENET = 1_281_167
"""Training images of ImageNet, assumed for a config with 1,000 classes but without files."""

Summary = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line `argv` (default: the process's)."""
    parser = make_parser(__doc__, "python tools/describe.py")
    parser.add_argument(
        "--config",
        required=True,
        help="config file with its arguments, joined by commas: configs/x.py:key=value,key",
    )
    parser.add_argument(
        "--chips", type=positive_int, help="devices; default: as few as config.mesh allows"
    )
    parser.add_argument("--parameters", action="store_true", help="list every parameter array")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    args, overrides = parser.parse_known_args(argv)
    summary = describe(configs.load(args.config, overrides), args.chips)
    table = summary.pop("table")
    print(json.dumps(summary, indent=2) if args.json else format_summary(args.config, summary))
    if args.parameters:
        print(table)


def describe(config: configs.ConfigDict, chips: int | None = None) -> Summary:
    """Returns the summary of a config's experiment, as JSON values.

    Args:
      config: Experiment config.
      chips: Number of devices in the mesh; None for as few as config.mesh allows.

    Raises:
      MeshError: If mesh, chips and batch do not fit each other.
    """
    mesh, rules = make_abstract_mesh(config, chips), build.make_rules(config)
    optimizer = build.make_optimizer(config)
    if configs.trains_decoder(config):
        parts = abstract_decoder_parts(config, rules)
        space, frozen = parts.space, parts.variables
        state, _ = build.make_decoder_state(config, parts, optimizer, mesh, rules)
        network: Summary = {"name": "decoder"}
    else:
        space, frozen = abstract_space(config)
        model = build.make_model(config, space, Constrain(rules, None))
        state, _ = build.make_state(config, model, space, optimizer, mesh, rules)
        network = {"name": config.model.name, **_cost(config, model, space)}
    held = {
        name: tree for name, tree in vars(state).items() if name != "step" and count_params(tree)
    }
    return {
        "network": network,
        "parameters": count_params(state.params),
        "table": parameter_table(state.params),
        "parts": {name: count_params(tree) for name, tree in state.params.items()},
        "latents": list(space.latent_shape),
        "space": {
            "name": config.space.name,
            "parameters": count_params(frozen),
            "bytes": tree_bytes(frozen),
        },
        "mesh": dict(mesh.shape),
        "state": {
            name: {"bytes": tree_bytes(tree), "bytes_per_chip": bytes_per_chip(tree)}
            for name, tree in held.items()
        },
        "schedule": _schedule(config),
        "data": _data(config, tree_bytes(abstract_batch(config, space))),
    }


def make_abstract_mesh(config: configs.ConfigDict, chips: int | None = None) -> Any:
    """Returns the config's mesh over `chips` abstract devices.

    Raises:
      MeshError: If mesh, chips and batch do not fit each other.
    """
    shape = MeshShape(**config.mesh.to_dict())
    if chips is None:
        chips = max(shape.data, 1) * max(shape.fsdp, 1) * max(shape.tensor, 1)
    mesh: Any = AbstractMesh(
        shape.resolve(chips), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES)
    )
    rules, micro = build.make_rules(config), config.optim.accumulate
    check_batch(config.data.global_batch, mesh, rules, accumulate=micro)
    return mesh


def _cost(config: configs.ConfigDict, model: Denoiser, space: InputSpace) -> Summary:
    without = config.copy_and_resolve_references()
    without.registers.update(num=0, gate=False)
    forward = model.forward_flops()
    return {
        "registers": config.registers.num,
        "register_start": config.registers.start,
        "forward_flops": forward,
        "register_flops": forward - build.make_model(without, space).forward_flops(),
        "step_flops": flops.train_step_flops(forward, config.data.global_batch),
    }


def _schedule(config: configs.ConfigDict) -> Summary:
    rate, section, steps = build.make_optimizer(config).learning_rate, config.optim, config.train
    marks = {0, section.warmup_steps, section.decay_end_steps, steps.steps // 2, steps.steps - 1}
    known = sorted(step for step in marks if 0 <= step < steps.steps)
    return {
        "name": section.schedule,
        "steps": steps.steps,
        "rates": {str(step): float(rate(step)) for step in known},
    }


def _data(config: configs.ConfigDict, step_bytes: int) -> Summary:
    section, images = config.data, None
    local = section.source in ("digits", "synthetic")
    if section.root or section.latents or local:
        images = len(build.make_source(config))
    elif section.num_classes == 1000:
        images = IMAGENET
    total = section.global_batch * config.train.steps
    return {
        "source": section.latents or section.source,
        "images_per_step": section.global_batch,
        "bytes_per_step": step_bytes,
        "images": images,
        "epochs": total / images if images else None,
    }


def format_summary(title: str, summary: Mapping[str, Any]) -> str:
    """Returns the summary as text."""
    network, space, data = summary["network"], summary["space"], summary["data"]
    lines = [title, "", f"{network['name']}: {summary['parameters']:,} parameters"]
    lines += [f"  {name:<22}{count:>15,}" for name, count in summary["parts"].items()]
    if "forward_flops" in network:
        forward, registers = network["forward_flops"], network["register_flops"]
        share = f"{registers / (forward - registers):.1%}"
        lines += [
            f"cost: {forward / 1e9:.5g} GFLOPs per image, {network['step_flops'] / 1e12:.4g} "
            "TFLOPs per step with the backward pass",
            f"  {network['registers']} registers from block {network['register_start']}: "
            f"{registers / 1e9:.3g} GFLOPs, {share} more than without"
            if network["registers"]
            else "  no registers",
        ]
    height, width, channels = summary["latents"]
    lines += [
        f"latents: {height} x {width} x {channels} ({space['name']}; frozen networks of "
        f"{space['parameters']:,} parameters, {_size(space['bytes'])} on each chip)",
        *_format_state(summary),
        f"schedule: {summary['schedule']['name']}, {summary['schedule']['steps']:,} steps",
    ]
    lines += [
        f"  step {int(k):>10,}{rate:>12.3g}" for k, rate in summary["schedule"]["rates"].items()
    ]
    epochs = "" if data["images"] is None else f", {data['epochs']:.1f} times {data['images']:,}"
    lines.append(
        f"data: {data['source']}, {data['images_per_step']:,} images "
        f"({_size(data['bytes_per_step'])}) per step{epochs}"
    )
    return "\n".join(lines)


def _format_state(summary: Mapping[str, Any]) -> list[str]:
    sizes = ", ".join(f"{axis} {size}" for axis, size in summary["mesh"].items())
    rows = dict(summary["state"])
    rows["together"] = {
        key: sum(row[key] for row in rows.values()) for key in ("bytes", "bytes_per_chip")
    }
    return [
        f"state on the mesh {sizes}:{'in all':>12}{'per chip':>12}",
        *(
            f"  {name:<22}{_size(row['bytes']):>18}{_size(row['bytes_per_chip']):>12}"
            for name, row in rows.items()
        ),
    ]


def _size(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size * 2**10 / GIB:.1f} MiB"


if __name__ == "__main__":
    run_main(main)
