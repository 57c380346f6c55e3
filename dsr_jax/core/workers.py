"""Worker processes that exit with the process that started them."""

import multiprocessing
import os
import threading
from multiprocessing.process import BaseProcess


def end_with_parent(*_: int) -> None:
    """Makes this worker process exit as soon as its parent has ended, even by SIGKILL.

    To be passed as `initializer` of a pool or `worker_init_fn` of Grain, whose arguments are
    ignored. The thread waits on a pipe that the operating system closes, and takes no CPU time.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)
