"""Worker processes that do not outlive the process that started them."""

import multiprocessing
import os
import threading
from multiprocessing.process import BaseProcess


def end_with_parent(*_: int) -> None:
    """Makes this worker process end as soon as its parent has ended, even by SIGKILL.

    For `initializer` of a pool, or `worker_init_fn` of Grain, whose arguments are not used. The
    watching thread waits on a pipe that the operating system closes, and costs nothing.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)
