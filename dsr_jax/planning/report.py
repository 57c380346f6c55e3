"""Report on a compiled program, its memory and its time bound, as JSON values and as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dsr_jax.parallel.topologies import Topology
from dsr_jax.planning.program_cost import Part, total
from dsr_jax.planning.roofline import METHOD, part_times

GIB = 2**30
_MAX_COLLECTIVES = 12
"""Number of collectives listed in the text, per network."""

Report = dict[str, Any]


@dataclass(frozen=True)
class Compiled:
    """Compiler's results for a program.

    Attributes:
      memory: Bytes on one chip, by purpose.
      needed: Sum of `memory`, or the compiler's own figure if the program does not fit.
      limit: Bytes available on one chip.
      seconds: Time of tracing and compiling.
      parts: Cost by part of the program; empty if the compiler failed.
      advice: Config changes that would make the program fit.
    """

    memory: Mapping[str, int]
    needed: int
    limit: int
    seconds: float
    parts: Sequence[Part] = ()
    advice: Sequence[str] = field(default_factory=tuple)

    @property
    def fits(self) -> bool:
        """Whether the program fits into memory."""
        return bool(self.parts) and self.needed <= self.limit


def make_report(
    subject: Mapping[str, Any],
    topology: Topology,
    compiled: Compiled,
    *,
    images: int,
    steps: int,
    model_flops: float | None,
) -> Report:
    """Returns the report as JSON values.

    Args:
      subject: First fields of the report, which identify the program.
      topology: Chips that the program was compiled for.
      compiled: Compiler's results.
      images: Number of images per step, over all chips.
      steps: Number of steps of the whole run.
      model_flops: Model FLOPs per step without recomputation, over all chips; None if unknown.
    """
    report = {
        **subject,
        "topology": topology.name,
        "chips": topology.num_chips,
        "slices": topology.slices,
        "accelerator_type": topology.accelerator_type,
        "images_per_chip": images / topology.num_chips,
        "fits": compiled.fits,
        "hbm_bytes_per_chip": compiled.needed,
        "hbm_limit_bytes": compiled.limit,
        "memory": dict(compiled.memory),
        "compile_seconds": round(compiled.seconds, 1),
        "advice": list(compiled.advice),
        "step_seconds_estimate": None,
        "mfu_bound": None,
    }
    if compiled.parts:
        report |= _speed(topology, compiled.parts, images, steps, model_flops)
    return report


def _speed(
    topology: Topology,
    parts: Sequence[Part],
    images: int,
    steps: int,
    model_flops: float | None,
) -> Report:
    chip, chips = topology.chip, topology.num_chips
    times, cost = part_times(parts, chip), total(list(parts))
    seconds = sum(time.seconds for time in times)
    useful = model_flops if model_flops is not None else cost.flops * chips
    collectives = [
        {
            "part": part.name,
            "kind": found.kind,
            "network": found.network,
            "group": found.group,
            "bytes": found.bytes,
            "count": count,
            "sent_bytes": round(count * found.wire_bytes),
        }
        for part in parts
        for found, count in part.cost.collectives.items()
    ]
    return {
        "step_seconds_estimate": seconds,
        "mfu_bound": useful / (seconds * chips * chip.peak_flops),
        "mfu_bound_of_compute_alone": useful / (cost.flops * chips),
        "images_per_second": images / seconds,
        "steps": steps,
        "days": steps * seconds / 86_400,
        "chip_hours": steps * seconds * chips / 3_600,
        "flops_per_chip": cost.flops,
        "model_flops": useful,
        "hbm_traffic_bytes": cost.hbm_bytes,
        "sent_bytes": cost.wire_bytes,
        "dcn_bytes": cost.dcn_bytes,
        "unknown_loops": cost.unknown_loops,
        "parts": [
            {
                "name": time.part.name,
                "trips": time.part.trips,
                "flops": time.part.cost.flops,
                "hbm_bytes": time.part.cost.hbm_bytes,
                "sent_bytes": time.part.cost.wire_bytes,
                "dcn_bytes": time.part.cost.dcn_bytes,
                "compute_seconds": time.compute,
                "hbm_seconds": time.hbm,
                "ici_seconds": time.ici,
                "dcn_seconds": time.dcn,
                "seconds": time.seconds,
                "bound": time.bound,
            }
            for time in times
        ],
        "collectives": sorted(collectives, key=lambda row: -row["sent_bytes"]),
        "how": METHOD,
    }


def format_report(report: Report) -> str:
    """Returns the report as text for a terminal."""
    outcome = "fits" if report["fits"] else "DOES NOT FIT"
    need, limit = report["hbm_bytes_per_chip"], report["hbm_limit_bytes"]
    lines = [
        f"{report['what']} of {report['config']} on {report['topology']} ({report['chips']} chips, "
        f"{slices_text(report)})",
        f"mesh {report['mesh']}, {report['images_per_chip']:g} images per chip, "
        f"remat {report['remat']}; compiled in {report['compile_seconds']:.0f} s",
        f"\nmemory per chip: {need / GIB:.2f} of {limit / GIB:.2f} GiB, {outcome}",
        *(f"  {size / GIB:8.3f} GiB  {name}" for name, size in report["memory"].items()),
    ]
    if "parts" in report:
        lines += _format_speed(report)
    if report["advice"]:
        lines += ["\nwhat would help:", *(f"  - {line}" for line in report["advice"])]
    return "\n".join(lines)


def slices_text(report: Report) -> str:
    """Returns the accelerator type and the number of slices."""
    many = f"{report['slices']} slices of " if report["slices"] > 1 else ""
    return f"{many}{report['accelerator_type']}"


def resources(report: Report) -> tuple[str, ...]:
    """Returns the names of the resources that can bound a part; keys are f"{name}_seconds"."""
    return ("compute", "hbm", "ici", "dcn") if report["slices"] > 1 else ("compute", "hbm", "ici")


def _format_speed(report: Report) -> list[str]:
    names = resources(report)
    heads = " ".join(f"{name if name == 'compute' else name.upper():>8}" for name in names)
    lines = [f"\ntime of a step in ms  {heads}   (trips)      part"]
    for part in report["parts"]:
        times = [f"{1e3 * part[f'{name}_seconds']:8.1f}" for name in names]
        lines.append(f"{'':21} {' '.join(times)}   x{part['trips']:<11} {part['name']}")
    lines.append("\nlargest collectives per chip and step")
    by_network = ([r for r in report["collectives"] if r["network"] == n] for n in ("DCN", "ICI"))
    for row in (row for rows in by_network for row in rows[:_MAX_COLLECTIVES]):
        lines.append(
            f"  {row['sent_bytes'] / 1e6:9.1f} MB sent: {row['count']:6} x {row['kind']} of "
            f"{row['bytes'] / 1e6:.2f} MB among {row['group']}"
            f"{' slices over the DCN' if row['network'] == 'DCN' else ''}, {row['part']}"
        )
    lines += [
        f"\nper chip and step {report['flops_per_chip'] / 1e12:.1f} TFLOP, "
        f"{report['hbm_traffic_bytes'] / 1e9:.0f} GB through HBM, "
        f"{report['sent_bytes'] / 1e9:.2f} GB sent"
        + (f", {report['dcn_bytes'] / 1e9:.2f} GB over the DCN" if report["slices"] > 1 else ""),
        f"a step takes {report['step_seconds_estimate']:.3f} s at best: "
        f"{report['images_per_second']:,.0f} images/s, MFU at most {report['mfu_bound']:.1%} "
        f"({report['mfu_bound_of_compute_alone']:.1%} if bound by compute alone)",
        f"{report['steps']:,} steps: {report['days']:.2f} days, {report['chip_hours']:,.0f} "
        "chip-hours",
    ]
    if report["unknown_loops"]:
        lines.append(f"{report['unknown_loops']} loops of unknown length are counted once")
    return lines
