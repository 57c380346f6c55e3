"""Operations, traffic and collectives of a program, with all trips of its loops."""

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp

from dsr_jax.planning.collectives import Collective
from dsr_jax.planning.hlo import parse
from dsr_jax.planning.program_cost import split_program

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


def test_a_fusion_reads_what_it_slices_and_nothing_of_fast_memory() -> None:
    scan, _ = split_program(parse(TEXT))
    # Slices of the weights, the layer's number, the result; counters; the neighbor's block.
    tile, number = 8 * 128 * 4, 4
    layer = tile + number + 2 * tile
    counters = 3 * number
    inner = 4 * (tile + counters)
    assert scan.cost.hbm_bytes == 3 * (layer + counters + inner)


class Layer(nn.Module):
    """Residual layer of one matmul."""

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return x + jnp.tanh(nn.Dense(32, name="dense")(x)), None


class Net(nn.Module):
    """Two stacks, of three and of five layers."""

    unroll: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for name, depth in (("first", 3), ("second", 5)):
            x, _ = nn.scan(
                Layer,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=depth,
                unroll=depth if self.unroll else 1,
            )(name=name)(x, None)
        return nn.Dense(16, name="head")(x)


def test_an_unrolled_program_has_the_parts_of_a_scanned_one() -> None:
    def parts(unroll: bool) -> dict[str, tuple[int, float]]:
        net, x = Net(unroll), jnp.zeros((8, 32))
        params = jax.eval_shape(net.init, jax.random.key(0), x)
        step = jax.jit(jax.grad(lambda params, x: jnp.sum(net.apply(params, x) ** 2)))
        text = step.lower(params, x).compile().as_text()
        return {p.name: (p.trips, p.cost.flops) for p in split_program(parse(text))}

    layer = 2 * 8 * 32 * 32
    expected = {
        "forward Net first": (3, 3 * layer),
        "forward Net second": (5, 5 * layer),
        "backward Net second": (5, 2 * 5 * layer),
        # Nobody asks for the gradient of the input, which a loop computes all the same.
        "backward Net first": (3, 2 * 3 * layer),
        "the rest": (1, 3 * 2 * 8 * 32 * 16),
    }
    assert parts(unroll=False) == expected
    unrolled = parts(unroll=True)
    assert unrolled.pop("backward Net first") == (3, (2 * 3 - 1) * layer)
    assert unrolled == {name: x for name, x in expected.items() if name in unrolled}
    assert len(unrolled) == 4


BETWEEN_LAYERS = """
%layer (p: f32[8,4], q: f32[4,4]) -> f32[8,4] {
  %p = f32[8,4]{1,0} parameter(0)
  %q = f32[4,4]{1,0} parameter(1)
  ROOT %dot = f32[8,4]{1,0} dot(%p, %q), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (x: f32[8,4], w: f32[2,4,4]) -> f32[8,4] {
  %x = f32[8,4]{1,0} parameter(0)
  %w = f32[2,4,4]{2,1,0} parameter(1)
  %first = f32[4,4]{1,0} slice(%w), metadata={op_name="jit(step)/jvp(Net)/slice"}
  %a = f32[8,4]{1,0} fusion(%x, %first), calls=%layer, metadata={op_name="NAME/dot_general"}
  %second = f32[4,4]{1,0} slice(%w), metadata={op_name="jit(step)/jvp(Net)/slice"}
  %moved = f32[4,4]{0,1} copy(%second)
  %b = f32[8,4]{1,0} fusion(%a, %moved), calls=%layer, metadata={op_name="NAME/dot_general"}
  ROOT %c = f32[8,4]{1,0} negate(%b), metadata={op_name="jit(step)/jvp(Net)/head/neg"}
}
"""


def test_what_stands_between_unrolled_layers_belongs_to_the_layer_before() -> None:
    text = BETWEEN_LAYERS.replace("NAME", "jit(step)/jvp(Net)/closed_call/blocks/dense")
    stack, rest = split_program(parse(text))
    assert (stack.name, stack.trips, stack.cost.kernels) == ("forward Net blocks", 2, 4)
    assert stack.cost.flops == 2 * (2 * 8 * 4 * 4) and rest.cost.flops == 0
    # The slice in front of the first layer, and what follows the last.
    assert rest.cost.kernels == 2


def test_combined_operations_belong_to_the_layers_of_the_first() -> None:
    layer = "jvp(Net)/closed_call/blocks/dense"
    text = BETWEEN_LAYERS.replace("NAME", f"jit(step)/{layer}")
    combined = f"jit(step)/({layer}/dot_general:transpose({layer})/dot_general)"
    assert f"jit(step)/{layer}/dot_general" in text
    parts = split_program(parse(text.replace(f"jit(step)/{layer}/dot_general", combined, 1)))
    assert [part.name for part in parts] == ["forward Net blocks", "the rest"]
