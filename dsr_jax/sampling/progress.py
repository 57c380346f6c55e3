"""Progress of a sampling job in lines of text."""

import datetime
from collections.abc import Callable
from time import monotonic


class JobProgress:
    """Logs the progress and remaining time of a job every few seconds."""

    def __init__(self, total: int, done: int, log: Callable[[str], None]) -> None:
        self.total, self.done, self.log = total, done, log
        self.timed = 0
        self.began = self.logged = 0.0

    def add(self, count: int) -> None:
        """Counts one batch; the first one, which compiles, is left out of the rate."""
        now = monotonic()
        self.done += count
        self.timed += count if self.began else 0
        self.began = self.began or now
        if self.done < self.total and now - self.logged < 5:
            return
        self.logged = now
        line = f"sampled {self.done}/{self.total}"
        if self.timed and now > self.began:
            rate = self.timed / (now - self.began)
            left = datetime.timedelta(seconds=round((self.total - self.done) / rate))
            line += f", {rate:.3g} images/s, {left} left"
        self.log(line)
