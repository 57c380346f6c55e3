"""The report of a compiled program: figures, text and page."""

import re
from collections import Counter

import pytest

from dsr_jax.parallel.topologies import find_topology
from dsr_jax.planning.collectives import Collective
from dsr_jax.planning.page import make_plan_page
from dsr_jax.planning.program_cost import Cost, Part
from dsr_jax.planning.report import Compiled, Report, format_report, make_report
from dsr_jax.planning.roofline import part_times
from tests.html_pages import check_page

V5E = find_topology("v5e:2x2")
SUBJECT = {
    "what": "training step",
    "config": "configs/<x>.py",
    "command": "python -m dsr_jax.compile --config=configs/<x>.py",
    "mesh": "data 1 x fsdp 4 x tensor 1",
    "remat": "full",
    "versions": {"jax": "0.10.2"},
}
PARTS = [
    # 1 s of products, 0.5 s of memory.
    Part("forward", 12, Cost(flops=197e12, hbm_bytes=4.05e11)),
    # 2 s of communication.
    Part("backward", 12, Cost(19.7e12, 8.1e10, Counter({Collective("all-gather", 4, 10**9): 240}))),
]


def report(**changes: object) -> Report:
    settings = {"memory": {"a": 3, "b": 4}, "needed": 7, "limit": 10, "seconds": 2.0}
    compiled = Compiled(**{**settings, "parts": PARTS, **changes})
    return make_report(SUBJECT, V5E, compiled, images=64, steps=100, model_flops=4 * 197e12)


def test_a_part_takes_as_long_as_its_slowest_resource() -> None:
    forward, backward = part_times(PARTS, V5E.chip)
    assert (forward.bound, backward.bound) == ("compute", "ici")
    assert forward.seconds == pytest.approx(1) and backward.seconds == pytest.approx(2)


def test_what_a_run_leaves_unused_is_not_there_for_the_program() -> None:
    assert report(reserve=3)["fits"] and "fits" in format_report(report(reserve=3))
    found = report(reserve=4)
    assert not found["fits"]
    reason = "since remat=auto leaves 4% unused"
    assert f"DOES NOT FIT, {reason}" in format_report(found)
    assert f"It does not fit, {reason}." in make_plan_page(found)
    assert reason not in format_report(report(needed=11))


def test_several_slices_may_wait_for_the_network_between_them() -> None:
    crossing = Counter({Collective("all-reduce", 2, 25 * 10**8, "DCN"): 5})
    part = Part("backward", 1, Cost(19.7e12, 8.1e10, crossing))
    (time,) = part_times([part], V5E.chip)
    assert (time.bound, time.seconds, time.ici) == ("dcn", pytest.approx(4), 0)
    compiled = Compiled(memory={"a": 3}, needed=7, limit=10, seconds=2.0, parts=(*PARTS, part))
    settings = {"images": 64, "steps": 100, "model_flops": None}
    found = make_report(SUBJECT, find_topology("2xv5e:2x2"), compiled, **settings)
    assert (found["chips"], found["slices"], found["dcn_bytes"]) == (8, 2, 125e8)
    text = format_report(found)
    assert "2xv5e:2x2 (8 chips, 2 slices of v5litepod-4)" in text
    assert "all-reduce of 2500.00 MB among 2 slices over the DCN, backward" in text
    assert "12.50 GB over the DCN" in text and "DCN ms" in make_plan_page(found)
    assert "DCN" not in format_report(report()) and "DCN ms" not in make_plan_page(report())


def test_gpus_have_their_own_words_and_their_kernels_counted() -> None:
    crossing = Counter({Collective("all-reduce", 2, 25 * 10**8, "DCN", 8): 5})
    part = Part("backward", 4, Cost(19.7e12, 8.1e10, crossing, matmul_bytes=8e9, kernels=120))
    compiled = Compiled(memory={"a": 3}, needed=7, limit=10, seconds=2.0, parts=(*PARTS, part))
    settings = {"images": 64, "steps": 100, "model_flops": None}
    found = make_report(SUBJECT, find_topology("2xh100:8"), compiled, **settings)
    assert (found["chips"], found["slices"], found["kernels"]) == (16, 2, 120)
    # Eight adapters share what a node sends.
    assert found["dcn_bytes"] == 125e8 / 8 and found["parts"][2]["dcn_seconds"] == 125e8 / 8 / 5e10
    text, page = format_report(found), make_plan_page(found)
    assert "2xh100:8 (16 GPUs, 2 nodes of 8 x NVIDIA H100 80GB HBM3)" in text
    assert "among 2 nodes over the network, backward" in text and "1.56 GB over the network" in text
    assert "GPU-hours" in text and "(8 GB by matmuls and attention)" in text
    for line in (text, page):
        assert "NVLink" in line and "kernels" in line and not re.search(r"\bICI\b|chip|DCN", line)
    assert "ICI" in (ours := format_report(report())) and "kernels" not in ours


def test_speed_follows_from_the_parts() -> None:
    found = report()
    assert found["fits"] and found["hbm_bytes_per_chip"] == 7
    assert found["step_seconds_estimate"] == pytest.approx(3)
    assert found["mfu_bound"] == pytest.approx(1 / 3)
    assert found["mfu_bound_of_compute_alone"] == pytest.approx(1 / 1.1)
    assert found["images_per_second"] == pytest.approx(64 / 3)
    assert found["chip_hours"] == pytest.approx(100 * 3 * 4 / 3600)
    (collective,) = found["collectives"]
    assert collective["count"] == 240 and collective["sent_bytes"] == 180e9


def test_what_did_not_compile_has_no_speed() -> None:
    found = report(parts=(), needed=11, advice=("buy more",))
    assert not found["fits"] and found["step_seconds_estimate"] is None
    text = format_report(found)
    assert "DOES NOT FIT" in text and "buy more" in text
    assert "does not fit" in make_plan_page(found)


def test_the_text_has_the_figures() -> None:
    text = format_report(report())
    assert "fits" in text and "MFU at most 33.3%" in text and "240 x all-gather" in text


def test_the_page_is_self_contained() -> None:
    page = make_plan_page(report())
    check_page(page)
    assert "<x>" not in page
