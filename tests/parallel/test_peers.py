"""Which processes are missing, behind or different, from heartbeats in a dictionary."""

from typing import Any

import pytest

from dsr_jax.core.errors import ConfigError, ProcessError
from dsr_jax.parallel.peers import (
    Heartbeat,
    Peers,
    PeerState,
    check_identical,
    describe_hang,
    missing,
)


class Dictionary:
    """A store in memory."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None:
        if key in self.values and not allow_overwrite:
            raise RuntimeError(f"ALREADY_EXISTS: {key}")
        self.values[key] = value

    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]:
        return [(k, v) for k, v in self.values.items() if k.startswith(key)]

    def blocking_key_value_get(self, key: str, timeout_in_ms: int) -> str:
        if key not in self.values:
            raise RuntimeError(f"DEADLINE_EXCEEDED: {timeout_in_ms}")
        return self.values[key]


def seen(*heartbeats: Any, silent: float = 0.0) -> list[PeerState]:
    return [
        PeerState(Heartbeat(i, f"host{i}", **heartbeat), silent)
        for i, heartbeat in enumerate(heartbeats)
    ]


def test_the_time_limit_counts_from_the_last_new_heartbeat() -> None:
    store, clock = Dictionary(), [0.0]
    one, two = (Peers(store, i, 2, 10.0, now=lambda: clock[0]) for i in (0, 1))
    two.exchange(Heartbeat(1, "b", step=7))
    for clock[0] in (1.0, 5.0, 9.0):
        one.exchange(Heartbeat(0, "a"))
    assert [s.silent for s in one.seen()] == [0.0, 8.0]
    assert missing(one.seen(), 0, 10.0) is None
    clock[0] = 12.0
    one.exchange(Heartbeat(0, "a"))
    text = missing(one.seen(), 0, 10.0)
    assert text == "process 1 (b) is lost: no heartbeat for 11 s, last seen at step 7, starting"
    assert missing(one.seen(), 1, 10.0) is None, "a process does not miss itself"
    assert two.unanswered() == 12.0 and one.unanswered() == 0.0


def test_a_process_that_never_came_is_missed_too() -> None:
    clock = [0.0]
    one = Peers(Dictionary(), 0, 3, 10.0, now=lambda: clock[0])
    clock[0] = 11.0
    text = missing(one.seen(), 0, 10.0)
    assert text is not None and text.startswith("process 1 (unknown host) is lost")
    assert "\nprocess 2 (unknown host) is lost" in text


def test_a_failure_reason_reaches_all() -> None:
    store = Dictionary()
    one, two = (Peers(store, i, 2, 10.0) for i in (0, 1))
    assert one.exchange(Heartbeat(0)) is None
    two.publish_failure_reason("process 7 is lost")
    assert one.exchange(Heartbeat(0)) == "process 7 is lost"


def test_an_error_goes_before_silence_and_a_good_end_is_not_missed() -> None:
    states = seen({"ended": "DataError: x"}, {}, {"ended": ""}, silent=99.0)
    assert missing(states, 1, 10.0) == "process 0 (host0) ended: DataError: x"
    assert missing(states[2:], 1, 10.0) is None


@pytest.mark.parametrize(
    ("places", "head"),
    [
        ([(5, "in step"), (5, "waiting for data")], "process 1 (host1) behind the others"),
        ([(4, "saving"), (5, "waiting for data")], "process 0 (host0) behind the others"),
        ([(5, "in step"), (5, "in step")], "all processes are at the same step and phase"),
        ([(5, "in step")], "the run does not move\n"),
    ],
)
def test_a_hang_names_the_process_that_is_behind(places: Any, head: str) -> None:
    states = seen(*({"step": s, "phase": p, "seconds": 9.0} for s, p in places))
    text = describe_hang(states, 5.0)
    assert head in text
    assert f"process 0 (host0): at step {places[0][0]}, {places[0][1]} for 9 s" in text


def test_a_process_without_heartbeat_is_named_before_one_behind() -> None:
    states = [*seen({"step": 4}), PeerState(Heartbeat(1, "host1", step=5), 8.0)]
    assert "no heartbeat from process 1 (host1)" in describe_hang(states, 5.0)


def test_a_process_that_ended_by_the_same_hang_is_still_named() -> None:
    states = seen({"step": 5}, {"step": 4, "hung": True, "ended": ""})
    assert "process 1 (host1) behind" in describe_hang(states, 5.0)


def test_a_large_run_is_a_screen() -> None:
    text = describe_hang(seen(*({"step": int(i != 77)} for i in range(256))), 5.0)
    assert "process 77 (host77) behind" in text and len(text.splitlines()) == 2


def test_the_process_with_another_version_is_named() -> None:
    store = Dictionary()
    values = [{"jax": "1", "code": "abc"}, {"jax": "2", "code": "abc"}, {"jax": "1", "code": "abc"}]
    for process in (0, 1):
        with pytest.raises(ProcessError, match="process 1|process 2"):
            check_identical(store, process, 3, values[process], timeout=0.0)
    with pytest.raises(ConfigError) as caught:
        check_identical(store, 2, 3, values[2], timeout=0.0)
    text = caught.value.problem
    assert "differ from the others: 1 (" in text and "jax: 2 there, 1 elsewhere" in text
    assert "code" not in text


def test_equal_processes_pass_and_a_late_one_is_named() -> None:
    store = Dictionary()
    with pytest.raises(ProcessError, match="process 1 has not started within 0 s"):
        check_identical(store, 0, 2, {"a": 1}, timeout=0.0)
    check_identical(store, 1, 2, {"a": 1}, timeout=0.0)
