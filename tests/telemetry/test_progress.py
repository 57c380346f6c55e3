"""A bar on a terminal, few lines in a file, nothing from other processes."""

import io
import re
import threading

import pytest

from dsr_jax.telemetry.clock import Timing
from dsr_jax.telemetry.progress import Progress, announce, announce_first_call

TIMING = Timing(step_seconds=0.25, images_per_second=4096.0, eta_seconds=3725.0)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_line_has_all_metrics() -> None:
    stream = io.StringIO()
    with Progress(1000, stream=stream) as progress:
        progress.update(50, loss=0.51234, timing=TIMING, mfu=0.4231)
        progress.log("saved step 50")
    assert stream.getvalue().splitlines() == [
        "step 50/1000, loss 0.5123, 0.25 s/step, 4096 images/s, ETA 1:02:05, MFU 42.3 %",
        "saved step 50",
    ]


def test_lines_are_bounded_and_reach_the_end() -> None:
    stream = io.StringIO()
    with Progress(100_000, stream=stream, max_lines=20) as progress:
        for step in range(1, 100_001):
            progress.update(step, loss=1.0 if step % 10 == 0 else None)
    lines = stream.getvalue().splitlines()
    assert 20 <= len(lines) <= 22
    assert lines[0].startswith("step 10/") and lines[-1].startswith("step 100000/100000")


def test_unknown_values_are_left_out() -> None:
    stream = io.StringIO()
    with Progress(10, stream=stream) as progress:
        progress.update(1)
        progress.update(2, loss=0.5)
    assert stream.getvalue() == "step 2/10, loss 0.5000\n"


def test_one_bar_on_a_terminal() -> None:
    stream = Terminal()
    with Progress(10, start_step=4, stream=stream) as progress:
        for step in range(5, 11):
            progress.update(step, loss=0.25, timing=TIMING)
        progress.log("done")
    text = stream.getvalue()
    assert "4/10" in text and "10/10" in text and "100%" in text
    assert "loss 0.2500" in text and "4096 images/s" in text and "done\n" in text
    assert text.count("\n") == 2  # the message and the end of the one bar


def test_other_processes_log_nothing() -> None:
    for stream in (io.StringIO(), Terminal()):
        with Progress(10, stream=stream, process_zero=False) as progress:
            progress.update(1, loss=0.5)
            progress.log("hello")
        assert stream.getvalue() == ""


def test_announce_prints_elapsed_seconds_until_the_end() -> None:
    """A block that ends only when two lines in between have been printed."""
    seen = threading.Event()

    class Lines(io.StringIO):
        def write(self, text: str) -> int:
            count = super().write(text)
            if len(re.findall(r"compiling it: [0-9]+ s", self.getvalue())) >= 2:
                seen.set()
            return count

    stream = Lines()
    with announce("compiling it", every=0.01, stream=stream):
        assert seen.wait(60)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "compiling it ..." and len(lines) >= 4
    assert re.fullmatch(r"compiling it: done in [0-9]+\.[0-9] s", lines[-1])


def test_announce_logs_nothing_about_fast_work() -> None:
    stream = io.StringIO()
    with announce("adding", only_if_slow=True, every=600, stream=stream):
        pass
    assert stream.getvalue() == ""


def test_announce_passes_errors_on_and_stops() -> None:
    stream = io.StringIO()
    with pytest.raises(ZeroDivisionError), announce("dividing", every=0.01, stream=stream):
        raise ZeroDivisionError
    assert stream.getvalue().startswith("dividing ...\n") and "done" not in stream.getvalue()


def test_only_the_first_call_is_announced(capsys: pytest.CaptureFixture[str]) -> None:
    double = announce_first_call(lambda x, *, more=0: 2 * x + more, "a doubling")
    assert [double(1), double(2, more=1)] == [2, 5]
    assert capsys.readouterr().err.count("compiling a doubling ...") == 1
