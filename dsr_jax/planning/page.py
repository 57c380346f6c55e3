"""HTML page of a `planning.report` report, in one self-contained file."""

from __future__ import annotations

import html
from collections.abc import Iterable

from dsr_jax.planning.report import GIB, Report, chips_text, resources, slices_text, words

_COLORS = ("#4269d0", "#efb118", "#6cc5b0", "#ff725c", "#a463f2", "#9c6b4e", "#97bbf5", "#3ca951")
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 60em; padding: 0 1em }
table { border-collapse: collapse; margin: 1em 0 } td, th { padding: .15em .8em; text-align: right }
td:first-child, th:first-child { text-align: left } tr { border-bottom: 1px solid #8884 }
.bar { display: flex; height: 1.6em; background: #8882 } .bar div { min-width: 1px }
.key { display: inline-block; width: .8em; height: .8em; margin-right: .4em } .bad { color: #c00 }
"""


def make_page(report: Report) -> str:
    """Returns the report as an HTML page."""
    title = f"{report['what']} of {report['config']} on {report['topology']}"
    need, limit = report["hbm_bytes_per_chip"], report["hbm_limit_bytes"]
    chip = words(report).chip
    outcome = "It fits." if report["fits"] else '<b class="bad">It does not fit.</b>'
    body = [
        f"<h1>{_text(title)}</h1>",
        f"<p>{chips_text(report)} ({_text(slices_text(report))}), mesh "
        f"{_text(report['mesh'])}, {report['images_per_chip']:g} images per {chip}, remat "
        f"{_text(report['remat'])}. Compiled in {report['compile_seconds']:.0f} s with "
        f"{_text(', '.join(f'{k} {v}' for k, v in report['versions'].items()))}.</p>",
        f"<p><code>{_text(report['command'])}</code></p>",
        f"<h2>Memory per {chip}: {need / GIB:.2f} of {limit / GIB:.2f} GiB</h2><p>{outcome}</p>",
        _bar(report["memory"], max(need, limit)),
        _table(
            ("purpose", "GiB"),
            ((_key(i) + _text(name), f"{size / GIB:.3f}") for i, (name, size) in _memory(report)),
        ),
    ]
    if report["advice"]:
        body.append("<h2>What would help</h2>" + _list(report["advice"]))
    if "parts" in report:
        body += _speed(report)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{_text(title)}</title>'
        f"<style>{_STYLE}</style>{''.join(body)}</html>\n"
    )


def _speed(report: Report) -> list[str]:
    names, called = resources(report), words(report)
    rows = (
        (
            _text(part["name"]),
            str(part["trips"]),
            f"{part['flops'] / 1e12:.2f}",
            f"{part['hbm_bytes'] / 1e9:.1f}",
            f"{part['sent_bytes'] / 1e9:.3f}",
            *(f"{1e3 * part[f'{kind}_seconds']:.1f}" for kind in names),
            _text(names[part["bound"]]),
            f"{part['kernels']:,}",
        )
        for part in report["parts"]
    )
    heads = "part,layers,TFLOP,GB of HBM,GB sent".split(",")
    heads += [*(f"{name} ms" for name in names.values()), "bound by", "kernels"]
    collectives = (
        (
            _text(row["kind"]),
            _text(row["part"]),
            _text(called.networks[row["network"]]),
            str(row["group"]),
            f"{row['bytes'] / 1e6:.3f}",
            f"{row['count']:,}",
            f"{row['sent_bytes'] / 1e6:.1f}",
        )
        for row in report["collectives"]
    )
    return [
        f"<h2>A step takes {report['step_seconds_estimate']:.3f} s at best</h2>",
        f"<p>{report['images_per_second']:,.0f} images/s; MFU at most {report['mfu_bound']:.1%}, "
        f"{report['mfu_bound_of_compute_alone']:.1%} if bound by compute alone; "
        f"{report['steps']:,} steps are {report['days']:.2f} days and "
        f"{report['chip_hours']:,.0f} {called.chip}-hours.</p>",
        _bar({part["name"]: part["seconds"] for part in report["parts"]}),
        _table(heads, rows),
        f"<p>{_text(report['how'])}</p>",
        f"<h2>Collectives per {called.chip} and step</h2>",
        _table(
            f"kind,part,network,{called.chip}s or {called.slices},MB each,times,MB sent".split(","),
            collectives,
        ),
    ]


def _memory(report: Report) -> Iterable[tuple[int, tuple[str, int]]]:
    return enumerate(report["memory"].items())


def _text(value: object) -> str:
    return html.escape(str(value))


def _key(index: int) -> str:
    return f'<span class="key" style="background:{_COLORS[index % len(_COLORS)]}"></span>'


def _bar(sizes: dict[str, float], whole: float | None = None) -> str:
    whole = whole or sum(sizes.values()) or 1
    cells = (
        f'<div style="width:{100 * size / whole:.2f}%;background:{_COLORS[i % len(_COLORS)]}" '
        f'title="{_text(name)}"></div>'
        for i, (name, size) in enumerate(sizes.items())
    )
    return f'<div class="bar">{"".join(cells)}</div>'


def _table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = ["".join(f"<th>{head}</th>" for head in heads)]
    lines += ["".join(f"<td>{cell}</td>" for cell in row) for row in rows]
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _list(lines: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{_text(line)}</li>' for line in lines)}</ul>"
