"""HTML page of a `planning.report` report, in one self-contained file."""

from __future__ import annotations

from collections.abc import Iterable

from dsr_jax.planning.report import (
    GIB,
    Report,
    chips_text,
    reserve_note,
    resources,
    slices_text,
    words,
)
from dsr_jax.reports.page import bar, items, key, make_page, table, text


def make_plan_page(report: Report) -> str:
    """Returns the report as an HTML page."""
    title = f"{report['what']} of {report['config']} on {report['topology']}"
    return make_page(title, plan_sections(report), intro=_summary(report))


def plan_sections(report: Report, name: str = "") -> list[tuple[str, str]]:
    """Returns titles and contents of the report's sections.

    Args:
      report: The report.
      name: Put behind the names of tables, where a page has several plans.
    """
    need, limit = report["hbm_bytes_per_chip"], report["hbm_limit_bytes"]
    failed = f'<b class="bad">It does not fit{reserve_note(report)}.</b>'
    outcome = "It fits." if report["fits"] else failed
    sections = [
        (
            f"Memory per {words(report).chip}: {need / GIB:.2f} of {limit / GIB:.2f} GiB",
            f"<p>{outcome}</p>"
            + bar(report["memory"], max(need, limit))
            + table(
                ("purpose", "GiB"),
                ((key(i) + text(name), f"{size / GIB:.3f}") for i, (name, size) in _memory(report)),
                f"memory {name}",
            ),
        )
    ]
    if report["advice"]:
        sections.append(("What would help", items(report["advice"])))
    if "parts" in report:
        sections += _speed(report, name)
    return sections


def _summary(report: Report) -> str:
    return (
        f"<p>{text(chips_text(report))} ({text(slices_text(report))}), mesh "
        f"{text(report['mesh'])}, {report['images_per_chip']:g} images per {words(report).chip}, "
        f"remat {text(report['remat'])}. Compiled in {report['compile_seconds']:.0f} s with "
        f"{text(', '.join(f'{k} {v}' for k, v in report['versions'].items()))}.</p>"
        f"<p><code>{text(report['command'])}</code></p>"
    )


def _speed(report: Report, name: str) -> list[tuple[str, str]]:
    names, called = resources(report), words(report)
    rows = (
        (
            text(part["name"]),
            str(part["trips"]),
            f"{part['flops'] / 1e12:.2f}",
            f"{part['hbm_bytes'] / 1e9:.1f}",
            f"{part['sent_bytes'] / 1e9:.3f}",
            *(f"{1e3 * part[f'{kind}_seconds']:.1f}" for kind in names),
            text(names[part["bound"]]),
            f"{part['kernels']:,}",
        )
        for part in report["parts"]
    )
    heads = "part,layers,TFLOP,GB of HBM,GB sent".split(",")
    heads += [*(f"{name} ms" for name in names.values()), "bound by", "kernels"]
    collectives = (
        (
            text(row["kind"]),
            text(row["part"]),
            text(called.networks[row["network"]]),
            str(row["group"]),
            f"{row['bytes'] / 1e6:.3f}",
            f"{row['count']:,}",
            f"{row['sent_bytes'] / 1e6:.1f}",
        )
        for row in report["collectives"]
    )
    step = (
        f"<p>{report['images_per_second']:,.0f} images/s; MFU at most {report['mfu_bound']:.1%}, "
        f"{report['mfu_bound_of_compute_alone']:.1%} if bound by compute alone; "
        f"{report['steps']:,} steps are {report['days']:.2f} days and "
        f"{report['chip_hours']:,.0f} {called.chip}-hours.</p>"
        + bar({part["name"]: part["seconds"] for part in report["parts"]})
        + table(heads, rows, f"parts {name}")
        + f"<p>{text(report['how'])}</p>"
    )
    columns = f"kind,part,network,{called.chip}s or {called.slices},MB each,times,MB sent".split(
        ","
    )
    return [
        (f"A step takes {report['step_seconds_estimate']:.3f} s at best", step),
        (
            f"Collectives per {called.chip} and step",
            table(columns, collectives, f"collectives {name}"),
        ),
    ]


def _memory(report: Report) -> Iterable[tuple[int, tuple[str, int]]]:
    return enumerate(report["memory"].items())
