"""Shared parts of all commands: argument parsing, error reports and exit statuses.

A `DsrError` ends a command with its message, without a traceback, and with its own exit status.
"""

import argparse
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from dsr_jax.core.errors import DsrError, StuckSaveError
from dsr_jax.core.files import name_storage_errors
from dsr_jax.core.lock import release_all
from dsr_jax.core.secrets import hide_secrets, hide_secrets_in_logs

END_SECONDS = 15.0


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the description's lines and adds each option's default to its help."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        shown = action.option_strings and action.nargs != 0 and "default" not in text
        if not shown or action.required or action.default in (None, "", [], (), argparse.SUPPRESS):
            return text
        return f"{text} (default: %(default)s)".lstrip()


class _Parser(argparse.ArgumentParser):
    """Expands "~/" behind an equals sign, as in --workdir=~/runs, which shells leave alone.

    Parsers of subcommands are of this class, too.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"formatter_class": _HelpFormatter, **settings})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        given = sys.argv[1:] if args is None else args
        return super().parse_known_args([_expand_home(text) for text in given], namespace)


def _expand_home(argument: str) -> str:
    name, equals, value = argument.partition("=")
    if not name.startswith("-") or not value.startswith("~/"):
        return argument
    return name + equals + os.path.expanduser(value)


def make_parser(description: str | None, prog: str | None = None) -> argparse.ArgumentParser:
    """Builds the parser of a command whose --help names the default of every option.

    Args:
      description: Docstring of the module, printed unchanged.
      prog: Name of the command, such as "python -m dsr_jax.evaluate"; None for the file's name.
    """
    return _Parser(prog=prog, description=description)


def positive_int(text: str) -> int:
    """Parses a positive integer, as in `add("--batch", type=positive_int)`."""
    if (value := _integer(text)) <= 0:
        raise argparse.ArgumentTypeError(f"{value} is not positive: give 1 or more")
    return value


def count(text: str) -> int:
    """Parses an integer that is not negative, as in `add("--stop-after", type=count)`."""
    if (value := _integer(text)) < 0:
        raise argparse.ArgumentTypeError(f"{value} is negative: give 0 or more")
    return value


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def run_main(main: Callable[[], int | None]) -> None:
    """Calls `main` and exits with its status, or with that of a `DsrError`.

    A failed command ends within END_SECONDS, even if other threads are blocked. What libraries log
    is shown without secrets.
    """
    hide_secrets_in_logs()
    try:
        with name_storage_errors(None):
            status = main()
    except StuckSaveError as error:
        leave(error)
    except DsrError as error:
        show(error)
        _end_within(END_SECONDS, error.exit_status)
        sys.exit(error.exit_status)
    except Exception:
        _end_within(END_SECONDS, 1)
        # Python's own would print secrets as they are.
        sys.excepthook = lambda _kind, error, _traceback: show(error)
        raise
    sys.exit(status or 0)


def _end_within(seconds: float, status: int) -> None:
    """Ends the process after some time, in case blocked threads keep it from exiting."""

    def end() -> None:
        time.sleep(seconds)
        os._exit(status)

    threading.Thread(target=end, daemon=True).start()


def show(error: BaseException) -> None:
    """Prints an error that ends the program, with a traceback unless it is a `DsrError`."""
    if isinstance(error, DsrError):
        text = f"\n{type(error).__name__}: {error}\n"
    else:
        text = "".join(traceback.format_exception(error))
    print(hide_secrets(text), end="", file=sys.stderr, flush=True)


def leave(error: BaseException) -> NoReturn:
    """Prints an error and ends the process at once, from any thread.

    It waits neither for threads that hang in a write nor for JAX's own shutdown barrier, in which
    the processes of a run wait minutes for a missing one.
    """
    show(error)
    end_at_once(error.exit_status if isinstance(error, DsrError) else 1)


def end_at_once(status: int) -> NoReturn:
    """Ends the process without waiting for anything, from any thread; locks are given back."""
    sys.stdout.flush()
    sys.stderr.flush()
    # In a thread with a timeout, since storage may hang.
    releasing = threading.Thread(target=release_all, daemon=True)
    releasing.start()
    releasing.join(2.0)
    os._exit(status)
