"""What a plan compiles for a config, with a compiler that is imitated."""

import jax
import pytest

from dsr_jax import config as configs
from dsr_jax.parallel.topologies import find_topology
from dsr_jax.planning import programs
from dsr_jax.planning.program_cost import Cost, Part
from dsr_jax.planning.report import Compiled


@pytest.mark.parametrize(
    ("overrides", "needed", "fits", "remat"),
    [
        ([], {"none": 97, "dots": 90}, True, "dots (auto: none needs 97.00 GiB)"),
        (
            [],
            {"none": 120, "dots": 110, "full": 97},
            False,
            "full (auto: none needs 120.00 GiB, dots needs 110.00 GiB, full needs 97.00 GiB)",
        ),
        (["--config.model.remat=full"], {"full": 97}, True, "full"),
    ],
)
def test_a_plan_chooses_as_a_run_does(
    overrides: list[str],
    needed: dict[str, int],
    fits: bool,
    remat: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`auto` leaves 4% of the memory unused; a policy that is named may fill it."""

    def compiled(program: programs.AotProgram, *rest: object) -> Compiled:
        *_, reserve = rest
        size = needed[program.layout.remat] * programs.GIB
        part = Part("forward", 1, Cost(flops=1.0, hbm_bytes=1.0))
        unused = int(100 * programs.GIB * reserve)
        return Compiled({"all": size}, size, 100 * programs.GIB, 1.0, [part], (), unused)

    monkeypatch.setattr(programs, "_compile", compiled)
    monkeypatch.setattr(programs, "compile_only_devices", lambda topology: jax.devices()[:4])
    config = configs.load("configs/digits.py", overrides)
    found = programs.compile_report(config, find_topology("v5e:2x2"), "train", {"config": "x"})
    assert (found["fits"], found["remat"]) == (fits, remat)
