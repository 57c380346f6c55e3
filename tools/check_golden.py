"""Compares the project's numbers with golden numbers of the original code.

    python tools/check_golden.py DIR [--only GLOB ...] [--require GLOB ...]

Runs every case folder below DIR that the project supports and prints a line for each. Exits with 1
if one failed, or if one that --require names did not pass.
"""

import argparse
import fnmatch
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax

from dsr_jax.core.cli import make_parser
from tools.golden.compare import Outcome, find_cases, run_case


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (default: the process's); returns the exit status."""
    args = _parser().parse_args(argv)
    cases = find_cases(Path(args.folder))
    if args.only:
        cases = [case for case in cases if _matches(case.name, args.only)]
    if not cases:
        print(f"no cases below {args.folder}", file=sys.stderr)
        return 1
    outcomes = []
    with jax.default_matmul_precision("highest"):
        for case in cases:
            outcome = run_case(case)
            outcomes.append(outcome)
            print(f"{case.name:44} {outcome.status:11} {outcome.detail}".rstrip(), flush=True)
    unmet = _unmet(outcomes, args.require)
    for problem in unmet:
        print(f"required: {problem}")
    counts = {s: sum(o.status == s for o in outcomes) for s in ("pass", "FAIL", "unsupported")}
    print(f"{counts['pass']} passed, {counts['FAIL']} failed, {counts['unsupported']} unsupported")
    return 1 if counts["FAIL"] or unmet else 0


def _matches(name: str, globs: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, glob) for glob in globs)


def _unmet(outcomes: Sequence[Outcome], required: Sequence[str]) -> list[str]:
    """Returns a message for each required pattern without cases and each case that did not pass."""
    problems = []
    for glob in required:
        matching = [o for o in outcomes if fnmatch.fnmatchcase(o.case.name, glob)]
        if not matching:
            problems.append(f"{glob} names no case")
        problems += [f"{o.case.name} is {o.status}" for o in matching if o.status != "pass"]
    return problems


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument("folder", help="folder of case folders")
    parser.add_argument("--only", nargs="+", default=[], metavar="GLOB", help="run these only")
    parser.add_argument("--require", nargs="+", default=[], metavar="GLOB", help="must pass")
    return parser


if __name__ == "__main__":
    sys.exit(main())
