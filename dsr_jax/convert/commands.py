"""Shared parts of the commands that convert a file: arguments, and opening the file."""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dsr_jax.convert.fetch import fetch_snapshot
from dsr_jax.convert.files import check_new_folder, source_record
from dsr_jax.convert.readers import open_source
from dsr_jax.convert.recognize import check_family


class Opened(NamedTuple):
    """File that a command converts.

    Attributes:
      path: The file or folder.
      state: Arrays by name.
      record: Its entries of conversion.json: source, digest, entry, dropped names.
    """

    path: Path
    state: dict[str, np.ndarray]
    record: dict[str, Any]


def add_source_arguments(parser: argparse.ArgumentParser, source: str) -> None:
    """Adds --source, --out, --entry and --drop.

    Args:
      parser: Parser of one family's command.
      source: Help of --source.
    """
    parser.add_argument("--source", required=True, help=source)
    parser.add_argument("--out", required=True, help="new folder")
    parser.add_argument(
        "--entry", help="state dict inside the file; default: the EMA weights, else the model's"
    )
    parser.add_argument(
        "--drop",
        action="append",
        default=[],
        metavar="PATTERN",
        help="names to leave out, such as 'projectors.*'; may be repeated",
    )


def open_for(args: argparse.Namespace, family: str) -> Opened:
    """Opens the file that a command is to convert, after a look at where the result goes.

    Args:
      args: With the arguments of `add_source_arguments`.
      family: The command's name.

    Raises:
      ConversionError: If the folder --out is not empty, or the file is missing, damaged, without
        the entry, or recognized as another family's.
    """
    check_new_folder(args.out)
    path = fetch_snapshot(args.source)
    source = open_source(path, args.entry, args.drop)
    check_family(source.state, family, args.source)
    record = {"entry": source.entry, "dropped": args.drop, **source_record(args.source)}
    return Opened(path, source.state, record)
