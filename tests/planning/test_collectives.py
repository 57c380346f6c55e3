"""Collectives of compiled programs: kinds, groups, bytes, the networks they take."""

from pathlib import Path

import pytest

from dsr_jax.planning.collectives import Collective
from dsr_jax.planning.hlo import parse
from dsr_jax.planning.program_cost import split_program

# A program in the words of XLA's TPU compiler, see test_program_cost.
TEXT = Path(__file__).with_name("program.hlo").read_text()

REDUCE_SCATTER = """
%all-reduce-scatter.4 (input.4: f32[16,8]) -> f32[4,8] {
  %input.4 = f32[16,8]{1,0} parameter(0)
  %all-reduce.1 = f32[16,8]{1,0} all-reduce(%input.4), replica_groups=[2,4]<=[8], to_apply=%add
  %begin = u32[] constant(0)
  ROOT %slice = f32[4,8]{1,0} dynamic-slice(%all-reduce.1, %begin, %begin)
}

ENTRY %main (p: f32[16,8]) -> f32[4,8] {
  %p = f32[16,8]{1,0} parameter(0)
  ROOT %fusion = f32[4,8]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.4
}
"""


def test_a_sum_that_is_sliced_at_once_is_a_reduce_scatter() -> None:
    """As TPUs write it: the whole sum never arrives anywhere."""
    (rest,) = split_program(parse(REDUCE_SCATTER))
    assert rest.cost.collectives == {Collective("reduce-scatter", 4, 16 * 8 * 4): 1}
    assert rest.cost.wire_bytes == 16 * 8 * 4 * 3 / 4


BETWEEN_SLICES = """
ENTRY %main (p: f32[4,8]) -> f32[16,8] {
  %p = f32[4,8]{1,0} parameter(0)
  %start = token[] after-all()
  %send = (f32[4,8]{1,0}, u32[], token[]) send(%p, %start), frontend_attributes={ATTRIBUTES}
  ROOT %recv = (f32[16,8]{1,0}, u32[], token[]) recv(%start), frontend_attributes={ATTRIBUTES}
}
"""


@pytest.mark.parametrize(
    ("kind", "target", "group", "size", "sent"),
    [
        ("ALL_REDUCE", ',_xla_megascale_target="{1,2}x{0:7}"', 2, 128, 128),
        ("ALL_GATHER", ',_xla_megascale_target="{1,2,3,4}x{0:3}"', 4, 512, 384),
        # Without a target some slices may take part: at most all four.
        ("ALL_REDUCE", "", 4, 128, 192),
        ("ALL_TO_ALL", "", 4, 128, 96),
    ],
)
def test_what_hosts_exchange_counts_as_the_slices_network(
    kind: str, target: str, group: int, size: int, sent: float
) -> None:
    attributes = f'_xla_megascale_transfer_type="{kind}"{target}'
    text = BETWEEN_SLICES.replace("ATTRIBUTES", attributes)
    (rest,) = split_program(parse(text, slices=4))
    name = kind.lower().replace("_", "-")
    assert rest.cost.collectives == {Collective(name, group, size, "DCN"): 1}
    assert (rest.cost.wire_bytes, rest.cost.dcn_bytes) == (0, sent)
    assert rest.cost.hbm_bytes == 128 + 512


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("replica_groups={{0,2,4},{1,3,5}}", 3),
        ("replica_groups=[2,4]<=[8]", 4),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0','axis_1'}", 8),
        ("replica_groups=mesh['axis_0'=16] {'axis_0':(1)2}", 2),
        ("replica_groups=mesh['a'=1,'b'=16,'c'=4], device_ids=([4,16]T(1,0)) {'b'}", 16),
    ],
)
def test_all_notations_of_groups(groups: str, size: int) -> None:
    program = parse(TEXT.replace("replica_groups=[2,4]<=[8]", groups))
    (found,) = split_program(program)[-1].cost.collectives
    assert found.group == size


def test_an_unknown_notation_of_groups_is_an_error() -> None:
    program = parse(TEXT.replace("replica_groups=[2,4]<=[8]", "replica_groups=everyone"))
    with pytest.raises(ValueError, match="everyone"):
        split_program(program)


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        # Eight GPUs of one node: NVLink alone.
        ("replica_groups=[2,8]<=[16]", [Collective("all-gather", 8, 512)]),
        # The same GPU of both nodes: the network alone, each with its own adapter.
        ("replica_groups=[8,2]<=[2,8]T(1,0)", [Collective("all-gather", 2, 512, "DCN")]),
        (
            "replica_groups=mesh['data'=2,'fsdp'=8] {'data'}",
            [Collective("all-gather", 2, 512, "DCN")],
        ),
        # All: over NVLink, and once between nodes over eight adapters.
        (
            "replica_groups=[1,16]<=[16]",
            [Collective("all-gather", 16, 512), Collective("all-gather", 2, 512, "DCN", 8)],
        ),
        (
            "replica_groups={{0,1,8,9},{2,3,10,11}}",
            [Collective("all-gather", 4, 512), Collective("all-gather", 2, 512, "DCN", 2)],
        ),
        # Half of an axis of the mesh: its devices are two apart, or follow each other.
        ("replica_groups=mesh['x'=16] {'x':(1)2}", [Collective("all-gather", 2, 512, "DCN")]),
        ("replica_groups=mesh['x'=16] {'x':(2)8}", [Collective("all-gather", 8, 512)]),
    ],
)
def test_groups_of_gpus_take_the_links_between_their_members(
    groups: str, expected: list[Collective]
) -> None:
    text = GATHER.replace("GROUPS", groups)
    (rest,) = split_program(parse(text, slices=2, gpus=8))
    assert list(rest.cost.collectives) == expected


GATHER = """
ENTRY %main (p: f32[4,8]) -> f32[16,8] {
  %p = f32[4,8]{1,0} parameter(0)
  %begin = ((f32[4,8]{1,0}), f32[16,8]{1,0}) all-gather-start(%p), GROUPS, dimensions={0}
  ROOT %end = f32[16,8]{1,0} all-gather-done(%begin)
}
"""


def test_gpus_of_a_node_share_the_bytes_that_leave_it() -> None:
    among = Collective("all-reduce", 2, 800, "DCN", links=8)
    assert among.wire_bytes == 2 * 800 / 2 / 8
    text = GATHER.replace("all-gather", "all-to-all").replace("f32[16,8]", "f32[4,8]")
    text = text.replace("GROUPS", "replica_groups=[1,16]<=[16]")
    (rest,) = split_program(parse(text, slices=2, gpus=8))
    # In an all-to-all each sends half of its own bytes to the other node.
    assert rest.cost.dcn_bytes == 128 / 2


@pytest.mark.parametrize(("target", "network"), [(1, "ICI"), (8, "DCN")])
def test_a_permutation_waits_for_its_slowest_pair(target: int, network: str) -> None:
    pairs = f"source_target_pairs={{{{2,3}},{{0,{target}}}}}"
    text = GATHER.replace("all-gather", "collective-permute").replace("GROUPS", pairs)
    text = text.replace("f32[16,8]", "f32[4,8]")
    (rest,) = split_program(parse(text, slices=2, gpus=8))
    assert rest.cost.collectives == {Collective("collective-permute", 2, 128, network): 1}
