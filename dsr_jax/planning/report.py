"""Report on a compiled program, its memory and its time bound, as JSON values and as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dsr_jax.parallel.device_memory import RESERVE
from dsr_jax.parallel.topologies import AnyTopology
from dsr_jax.planning.program_cost import Part, total
from dsr_jax.planning.roofline import METHODS, part_times

GIB = 2**30
_MAX_COLLECTIVES = 12
"""Number of collectives listed in the text, per network."""

Report = dict[str, Any]


@dataclass(frozen=True)
class Words:
    """What a report calls things.

    Attributes:
      chip: One device.
      slices: Groups of devices with fast links.
      networks: Names of the links within and between them, by `Collective.network`.
    """

    chip: str
    slices: str
    networks: Mapping[str, str]


_WORDS = {
    "tpu": Words("chip", "slices", {"ICI": "ICI", "DCN": "DCN"}),
    "gpu": Words("GPU", "nodes", {"ICI": "NVLink", "DCN": "network"}),
}


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
      reserve: Bytes of the limit that the run would leave unused.
    """

    memory: Mapping[str, int]
    needed: int
    limit: int
    seconds: float
    parts: Sequence[Part] = ()
    advice: Sequence[str] = field(default_factory=tuple)
    reserve: int = 0

    @property
    def fits(self) -> bool:
        """Whether the program fits into memory."""
        return bool(self.parts) and self.needed <= self.limit - self.reserve


def make_report(
    subject: Mapping[str, Any],
    topology: AnyTopology,
    compiled: Compiled,
    *,
    images: int,
    steps: int,
    model_flops: float | None,
) -> Report:
    """Returns the report as JSON values.

    Args:
      subject: First fields of the report, which identify the program.
      topology: Chips or GPUs that the program was compiled for.
      compiled: Compiler's results.
      images: Number of images per step, over all chips.
      steps: Number of steps of the whole run.
      model_flops: Model FLOPs per step without recomputation, over all chips; None if unknown.
    """
    report = {
        **subject,
        "topology": topology.name,
        "platform": topology.platform,
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
    topology: AnyTopology,
    parts: Sequence[Part],
    images: int,
    steps: int,
    model_flops: float | None,
) -> Report:
    chip, chips = topology.chip, topology.num_chips
    times, cost = part_times(parts, chip), total(list(parts))
    seconds = sum(time.seconds for time in times)
    useful = model_flops if model_flops is not None else cost.flops * chips
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
        "matmul_traffic_bytes": cost.matmul_bytes,
        "kernels": cost.kernels,
        "sent_bytes": cost.wire_bytes,
        "dcn_bytes": cost.dcn_bytes,
        "unknown_loops": cost.unknown_loops,
        "parts": [
            {
                "name": time.part.name,
                "trips": time.part.trips,
                "flops": time.part.cost.flops,
                "hbm_bytes": time.part.cost.hbm_bytes,
                "matmul_bytes": time.part.cost.matmul_bytes,
                "kernels": time.part.cost.kernels,
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
        "collectives": _collective_rows(parts),
        "how": METHODS[topology.platform],
    }


def _collective_rows(parts: Sequence[Part]) -> list[Report]:
    """Returns the collectives of all parts, the largest first."""
    rows = [
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
    return sorted(rows, key=lambda row: -row["sent_bytes"])


def reserve_note(report: Report) -> str:
    """Returns why a program that needs less than the limit does not fit; "" for any other."""
    below = report["hbm_bytes_per_chip"] <= report["hbm_limit_bytes"]
    return f", since remat=auto leaves {RESERVE:.0%} unused" if below and not report["fits"] else ""


def format_report(report: Report) -> str:
    """Returns the report as text for a terminal."""
    need, limit = report["hbm_bytes_per_chip"], report["hbm_limit_bytes"]
    outcome = "fits" if report["fits"] else f"DOES NOT FIT{reserve_note(report)}"
    chip = words(report).chip
    lines = [
        f"{report['what']} of {report['config']} on {report['topology']} "
        f"({chips_text(report)}, {slices_text(report)})",
        f"mesh {report['mesh']}, {report['images_per_chip']:g} images per {chip}, "
        f"remat {report['remat']}; compiled in {report['compile_seconds']:.0f} s",
        f"\nmemory per {chip}: {need / GIB:.2f} of {limit / GIB:.2f} GiB, {outcome}",
        *(f"  {size / GIB:8.3f} GiB  {name}" for name, size in report["memory"].items()),
    ]
    if "parts" in report:
        lines += [*_format_parts(report), *_format_collectives(report), *_format_speed(report)]
    if report["advice"]:
        lines += ["\nwhat would help:", *(f"  - {line}" for line in report["advice"])]
    return "\n".join(lines)


def words(report: Report) -> Words:
    """Returns the words for the report's devices."""
    return _WORDS[report["platform"]]


def chips_text(report: Report) -> str:
    """Returns the number of devices, such as "8 GPUs"."""
    return f"{report['chips']} {words(report).chip}{'s' if report['chips'] > 1 else ''}"


def slices_text(report: Report) -> str:
    """Returns the accelerator type and the number of slices or nodes."""
    many = f"{report['slices']} {words(report).slices} of " if report["slices"] > 1 else ""
    return f"{many}{report['accelerator_type']}"


def resources(report: Report) -> dict[str, str]:
    """Returns what can bound a part: the names by resource; keys are f"{resource}_seconds"."""
    networks = words(report).networks
    found = {"compute": "compute", "hbm": "HBM", "ici": networks["ICI"], "dcn": networks["DCN"]}
    return {key: name for key, name in found.items() if report["slices"] > 1 or key != "dcn"}


def _format_parts(report: Report) -> list[str]:
    names, on_gpus = resources(report), report["platform"] == "gpu"
    heads = " ".join(f"{name:>8}" for name in names.values())
    launches = " kernels" if on_gpus else ""
    lines = [f"\ntime of a step in ms  {heads}{launches}   (trips)      part"]
    for part in report["parts"]:
        times = [f"{1e3 * part[f'{name}_seconds']:8.1f}" for name in names]
        count = f" {part['kernels']:7}" if on_gpus else ""
        lines.append(f"{'':21} {' '.join(times)}{count}   x{part['trips']:<11} {part['name']}")
    return lines


def _format_collectives(report: Report) -> list[str]:
    called = words(report)
    lines = [f"\nlargest collectives per {called.chip} and step"]
    for network in ("DCN", "ICI"):
        rows = [row for row in report["collectives"] if row["network"] == network]
        among = f" {called.slices} over the {called.networks['DCN']}" if network == "DCN" else ""
        lines += [
            f"  {row['sent_bytes'] / 1e6:9.1f} MB sent: {row['count']:6} x {row['kind']} of "
            f"{row['bytes'] / 1e6:.2f} MB among {row['group']}{among}, {row['part']}"
            for row in rows[:_MAX_COLLECTIVES]
        ]
    return lines


def _format_speed(report: Report) -> list[str]:
    called = words(report)
    lines = [
        f"\nper {called.chip} and step {report['flops_per_chip'] / 1e12:.1f} TFLOP, "
        f"{report['hbm_traffic_bytes'] / 1e9:.0f} GB through HBM "
        f"({report['matmul_traffic_bytes'] / 1e9:.0f} GB by matmuls and attention), "
        f"{report['sent_bytes'] / 1e9:.2f} GB sent"
        + (
            f", {report['dcn_bytes'] / 1e9:.2f} GB over the {called.networks['DCN']}"
            if report["slices"] > 1
            else ""
        ),
        f"a step takes {report['step_seconds_estimate']:.3f} s at best: "
        f"{report['images_per_second']:,.0f} images/s, MFU at most {report['mfu_bound']:.1%} "
        f"({report['mfu_bound_of_compute_alone']:.1%} if bound by compute alone)",
        f"{report['steps']:,} steps: {report['days']:.2f} days, {report['chip_hours']:,.0f} "
        f"{called.chip}-hours",
    ]
    if report["platform"] == "gpu":
        lines.append(f"{report['kernels']:,} kernels, library calls and copies a step")
    if report["unknown_loops"]:
        lines.append(f"{report['unknown_loops']} loops of unknown length are counted once")
    return lines
