"""Runs a command whose process 0 finds the disk full when it writes a certain file.

python -m tests.disk_full progress.npz dsr_jax.evaluate samples.npz ...
"""

import errno
import os
import runpy
import sys
from pathlib import Path
from typing import Any

replace = os.replace


if __name__ == "__main__":
    name, module, *words = sys.argv[1:]
    if os.environ["DSR_PROCESS_ID"] == "0":

        def full(source: Any, target: Any) -> None:
            """Stands in for `os.replace`, with which whole files get their names."""
            if Path(target).name == name:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
            replace(source, target)

        os.replace = full
    sys.argv = [module, *words]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
