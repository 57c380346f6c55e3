"""Makes one HTML page of a run, or of several side by side, also while they train.

    python -m dsr_jax.report --workdir=runs/digits --out=digits.html
    python -m dsr_jax.report --workdir=runs/baseline runs/registers --out=both.html

The page holds curves of loss, loss by noise level, gradient norm and MFU, samples over steps, maps
of outlier tokens (config.log.outliers), scores, the differences of the configs, provenance, and the
plan of the training step if the run's folder has plan/report.json, the result of
`python -m dsr_jax.compile --out=RUN/plan`. It is self-contained: it asks for no other file.
"""

from collections.abc import Sequence
from pathlib import Path

from dsr_jax.core.cli import make_parser, run_main
from dsr_jax.core.files import name_damage, read_json, write_atomic
from dsr_jax.planning.page import plan_sections
from dsr_jax.reports.run_page import make_run_page


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line `argv` (default: the process's)."""
    parser = make_parser(__doc__, "python -m dsr_jax.report")
    parser.add_argument("--workdir", required=True, type=Path, help="the run's folder")
    parser.add_argument("others", nargs="*", type=Path, help="folders of further runs")
    parser.add_argument("--out", type=Path, help="file of the page; default: WORKDIR/report.html")
    args = parser.parse_args(argv)
    folders = [path.expanduser() for path in (args.workdir, *args.others)]
    plans = {
        folder: read_plan(path, folder.name)
        for folder in folders
        if (path := folder / "plan" / "report.json").is_file()
    }
    out = args.out or folders[0] / "report.html"
    write_atomic(out, make_run_page(folders, plans))
    print(f"written: {out}")


def read_plan(path: Path, name: str) -> list[tuple[str, str]]:
    """Returns the sections of a compiled program's report; see `planning.page.plan_sections`.

    Raises:
      DamagedFileError: If the file is damaged.
    """
    with name_damage(path, f"remove {path}, or make it again with python -m dsr_jax.compile"):
        return plan_sections(read_json(path), name)


if __name__ == "__main__":
    run_main(main)
