"""How entry points end: a `DsrError` becomes one screen of text and exit status 2."""

import sys
from collections.abc import Callable

from dsr_jax.core.errors import DsrError


def run_main(main: Callable[[], int | None]) -> None:
    """Calls `main` and exits with its status, 2 for an error that the user can act on."""
    try:
        status = main()
    except DsrError as error:
        print(f"\n{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    sys.exit(status or 0)
