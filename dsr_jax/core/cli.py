"""How entry points end: a `DsrError` becomes one screen of text and its own exit status."""

import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from dsr_jax.core.errors import DsrError, StuckSaveError


def run_main(main: Callable[[], int | None]) -> None:
    """Calls `main` and exits with its status, or with that of an error the user can act on."""
    try:
        status = main()
    except StuckSaveError as error:
        leave(error)
    except DsrError as error:
        show(error)
        sys.exit(error.exit_status)
    sys.exit(status or 0)


def show(error: BaseException) -> None:
    """Prints an error that ends the program; one that the user cannot act on with its traceback."""
    if isinstance(error, DsrError):
        print(f"\n{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    else:
        traceback.print_exception(error)
        sys.stderr.flush()


def leave(error: BaseException) -> NoReturn:
    """Prints an error and ends the process at once, from any thread.

    Nothing is waited for: neither threads that hang in a write nor JAX's own farewell, in which the
    processes of a run wait minutes for the one that is missing.
    """
    show(error)
    sys.stdout.flush()
    os._exit(error.exit_status if isinstance(error, DsrError) else 1)
