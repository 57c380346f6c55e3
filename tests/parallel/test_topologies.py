"""TPU slices: names, sizes, limits, devices to compile for."""

import pytest

from dsr_jax.core.errors import MeshError
from dsr_jax.models.tuning import target_platform
from dsr_jax.parallel import topologies
from dsr_jax.parallel.mesh import MeshShape, make_mesh, num_slices
from dsr_jax.parallel.topologies import CHIPS, compile_only_devices, find_topology
from dsr_jax.telemetry.flops import peak_flops
from tests.requirements import require

NAMES = [f"{name}:{shape}" for name, chip in CHIPS.items() for shape in chip.shapes]


@pytest.mark.parametrize(
    ("name", "chips", "accelerator"),
    [
        ("v5e:16x16", 256, "v5litepod-256"),
        ("v6e:2x4", 8, "v6e-8"),
        ("v4:2x2x1", 4, "v4-8"),
        ("v5p:16x16x24", 6144, "v5p-12288"),
    ],
)
def test_slices_have_the_names_that_the_cloud_gives_them(
    name: str, chips: int, accelerator: str
) -> None:
    topology = find_topology(name)
    assert (topology.num_chips, topology.accelerator_type) == (chips, accelerator)


def test_several_slices_are_written_in_front() -> None:
    topology = find_topology("4xv6e:4x4")
    assert (topology.slices, topology.shape, topology.num_chips) == (4, (4, 4), 64)
    assert (topology.slice_name, topology.accelerator_type) == ("v6e:4x4", "v6e-16")
    assert topology.larger[0] == "4xv6e:4x8" and find_topology("v6e:8x16").larger == ("v6e:16x16",)
    for name in ("0xv5e:2x2", "xv5e:2x2", "ax:2x2"):
        with pytest.raises(MeshError, match="unknown TPU or GPU"):
            find_topology(name)


def test_slices_of_a_kind_stand_by_size() -> None:
    """Advice names the next larger one."""
    for name, chip in CHIPS.items():
        sizes = [find_topology(f"{name}:{shape}").num_chips for shape in chip.shapes]
        assert sizes == sorted(set(sizes))


@pytest.mark.parametrize(
    ("name", "named"), [("v3:2x2", "v5e:16x16"), ("v5e:3x3", "4x4"), ("", "v4")]
)
def test_unknown_slices_are_rejected_with_the_choices(name: str, named: str) -> None:
    with pytest.raises(MeshError, match=named):
        find_topology(name)


def test_peaks_are_found_by_device_kind() -> None:
    for chip in CHIPS.values():
        assert peak_flops(chip.device_kind) == chip.peak_flops
        assert peak_flops(f"TPU {chip.generation}") == chip.peak_flops


def test_without_libtpu_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topologies.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MeshError, match=r"pip install 'dsr_jax\[tpu\]'"):
        compile_only_devices(find_topology("v5e:2x2"))


@pytest.mark.tpu
@pytest.mark.parametrize(
    "name", ["v4:2x2x2", "v5e:1x1", "v5e:16x16", "v5p:2x2x1", "v6e:2x4", "2xv5e:4x4"]
)
def test_devices_are_those_of_the_slice(name: str) -> None:
    require("libtpu", "tpu")
    topology = find_topology(name)
    devices = compile_only_devices(topology)
    assert len(devices) == topology.num_chips
    assert {device.device_kind for device in devices} == {topology.chip.device_kind}
    assert num_slices(devices) == topology.slices


@pytest.mark.tpu
def test_meshes_of_other_factors_than_the_torus_are_laid_out() -> None:
    require("libtpu", "tpu")
    devices = compile_only_devices(find_topology("v6e:8x8"))
    mesh = make_mesh(MeshShape(data=4, fsdp=16), devices)
    assert mesh.devices.shape == (4, 16, 1)
    assert {device.id for device in mesh.devices.flat} == {device.id for device in devices}


@pytest.mark.tpu
def test_what_is_traced_for_tpus_attends_as_tpus_do() -> None:
    """Not as the machine that compiles."""
    import jax

    require("libtpu", "tpu")
    mesh = make_mesh(MeshShape(), compile_only_devices(find_topology("v5e:2x2")))
    with jax.set_mesh(mesh):
        assert target_platform() == "tpu"
    assert target_platform() == jax.default_backend() == "cpu"
