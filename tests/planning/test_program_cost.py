"""Operations, traffic and collectives of a program, with all trips of its loops."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from dsr_jax.planning.hlo import parse
from dsr_jax.planning.program_cost import Collective, split_program, total

# A program in the words of XLA's TPU compiler, to count by hand. Its entry scans three layers;
# each gathers its weights [8, 4] over 4 devices, in two pieces, multiplies, and runs a loop of the
# compiler's own, of 8 / 2 trips, that sends 64 bytes to a neighbor.
TEXT = Path(__file__).with_name("program.hlo").read_text()


def test_a_scanned_stack_counts_as_often_as_it_runs() -> None:
    scan, rest = split_program(parse(TEXT))
    assert (scan.name, scan.trips) == ("forward Net blocks", 3)
    assert scan.cost.flops == 3 * 2 * 16 * 8 * 4
    assert rest.name == "the rest" and rest.cost.flops == 0


def test_collectives_are_counted_by_kind_group_and_size() -> None:
    scan, rest = split_program(parse(TEXT))
    assert scan.cost.collectives == {
        # Once per layer, although two fusions hold pieces of it.
        Collective("all-gather", 4, 8 * 4 * 4): 3,
        # The compiler's own loop runs four times per layer.
        Collective("collective-permute", 2, 64): 12,
    }
    assert rest.cost.collectives == {Collective("all-reduce", 4, 400): 1}
    assert scan.cost.wire_bytes == 3 * 128 * 3 / 4 + 12 * 64
    assert rest.cost.wire_bytes == 2 * 400 * 3 / 4


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


def test_a_fusion_reads_what_it_slices_and_nothing_of_fast_memory() -> None:
    scan, _ = split_program(parse(TEXT))
    # Slices of the weights, the layer's number, the result; counters; the neighbor's block.
    tile, number = 8 * 128 * 4, 4
    layer = tile + number + 2 * tile
    counters = 3 * number
    inner = 4 * (tile + counters)
    assert scan.cost.hbm_bytes == 3 * (layer + counters + inner)


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
    ("convolution", "products"),
    [
        ("convolution(%a, %b), window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f", (3 * 16 - 2) * 8),
        # A batched product as TPUs have it: every window hits one of the dilated inputs.
        (
            "convolution(%a, %b), window={size=16 stride=15 pad=0_0 lhs_dilate=16}, "
            "dim_labels=b0f_0io->b0f",
            16 * 8,
        ),
    ],
)
def test_padding_and_holes_cost_nothing(convolution: str, products: int) -> None:
    size = 3 if "size=3" in convolution else 16
    text = (
        "ENTRY %main (a: f32[2,16,4], b: f32[3,4,8]) -> f32[2,16,8] {\n"
        "  %a = f32[2,16,4]{2,1,0} parameter(0)\n"
        f"  %b = f32[{size},4,8]{{2,1,0}} parameter(1)\n"
        f"  ROOT %c = f32[2,16,8]{{2,1,0}} {convolution}\n"
        "}\n"
    )
    assert total(split_program(parse(text))).flops == 2 * 2 * 4 * products


@pytest.mark.parametrize(("kernel", "products"), [("fwd_no_residuals", 2), ("dkv_segmented", 5)])
def test_splash_kernels_count_their_matmuls(kernel: str, products: int) -> None:
    text = (
        "ENTRY %main (q: bf16[2,4,384,72], k: bf16[2,4,256,72]) -> bf16[2,4,384,72] {\n"
        "  %table = s8[1,1,1]{2,1,0} constant({...})\n"
        "  %q = bf16[2,4,384,72]{3,2,1,0} parameter(0)\n"
        "  %k = bf16[2,4,256,72]{3,2,1,0} parameter(1)\n"
        f"  ROOT %splash_mha_{kernel}.1 = bf16[2,4,384,72]{{3,2,1,0}} "
        'custom-call(%table, %q, %k, %k), custom_call_target="tpu_custom_call"\n'
        "}\n"
    )
    cost = total(split_program(parse(text)))
    assert cost.flops == products * 2 * (2 * 4) * 384 * 256 * 72


def test_matmuls_agree_with_xla_where_nothing_is_scanned() -> None:
    def loss(w: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.einsum("bli,io->blo", x, w) @ w.T)

    w, x = jnp.zeros((64, 128)), jnp.zeros((4, 32, 64))
    compiled = jax.jit(jax.grad(loss)).lower(w, x).compile()
    ours = total(split_program(parse(compiled.as_text()))).flops
    theirs = compiled.cost_analysis()["flops"]
    # They count additions, too.
    assert 0.95 * theirs < ours <= theirs
