"""Reading compiled programs: shapes, operands, computations, trips of loops."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from dsr_jax.planning.hlo import Array, parse

# A program in the words of XLA's TPU compiler, to count by hand. Its entry scans three layers;
# each gathers its weights [8, 4] over 4 devices, in two pieces, multiplies, and runs a loop of the
# compiler's own, of 8 / 2 trips, that sends 64 bytes to a neighbor.
TEXT = Path(__file__).with_name("program.hlo").read_text()


def test_instructions_have_shapes_operands_and_attributes() -> None:
    program = parse(TEXT)
    assert program.entry.name == "main" and len(program.computations) == 8
    layer = program.computations["fused_layer"]
    assert [i.name for i in layer.parameters()] == ["param_0", "param_1", "param_2"]
    gather = layer.instructions["all-gather.1"]
    assert gather.arrays == (Array("f32", (8, 4), padded=(8, 128)),) and gather.operands == (
        "shard",
    )
    assert gather.attribute(r"channel_id=(\d+)") == "5"
    assert layer.root.opcode == "convolution"
    assert [user.name for user in layer.users("shard")] == ["all-gather.1"]


def test_memory_spaces_other_than_hbm_are_distinguished() -> None:
    layer = parse(TEXT).computations["fused_layer"]
    x, weights = layer.instructions["param_2"].arrays[0], layer.instructions["param_0"].arrays[0]
    assert (x.in_hbm, x.bytes) == (False, 16 * 8 * 4)
    assert (weights.in_hbm, weights.bytes) == (True, 3 * 2 * 4 * 4)


@pytest.mark.parametrize(
    ("layout", "stored"),
    [
        ("", 3 * 20 * 72),
        ("{2,1,0}", 3 * 20 * 72),
        ("{2,1,0:T(8,128)(2,1)}", 3 * 24 * 128),
        # Tiles lie on the two dimensions that vary fastest, in whatever order.
        ("{1,0,2:T(8,128)(2,1)S(1)}", 8 * 128 * 72),
        ("{0,2,1:T(1024)}", 1024 * 20 * 72),
    ],
)
def test_tiles_are_stored_whole(layout: str, stored: int) -> None:
    text = f"ENTRY %main (x: bf16[3,20,72]) -> bf16[3,20,72] {{\n  ROOT %x = bf16[3,20,72]{layout}"
    (array,) = parse(f"{text} parameter(0)\n}}\n").entry.root.arrays
    assert (array.bytes, array.stored_bytes) == (2 * 3 * 20 * 72, 2 * stored)


def test_trips_are_the_limit_over_the_step() -> None:
    program = parse(TEXT)
    outer = program.entry.instructions["while.2"]
    inner = program.computations["outer_body"].instructions["while.1"]
    assert (program.trips(outer), program.trips(inner)) == (3, 4)


def test_a_loop_with_a_data_dependent_end_has_no_trip_count() -> None:
    stopping = TEXT.replace("compare(%layer, %depth), direction=LT", "custom-call(%layer)")
    program = parse(stopping)
    assert program.trips(program.entry.instructions["while.2"]) is None


def test_a_recorded_trip_count_is_taken() -> None:
    recorded = TEXT.replace(
        "body=%outer_body", 'body=%outer_body, backend_config={"known_trip_count":{"n":"20"}}'
    )
    program = parse(recorded)
    assert recorded != TEXT and program.trips(program.entry.instructions["while.2"]) == 20


def test_programs_of_this_machines_compiler_are_read() -> None:
    def scan(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda h, _: (jnp.tanh(h @ w), None), x, length=5)[0]

    compiled = jax.jit(scan).lower(jnp.zeros((4, 8)), jnp.zeros((8, 8))).compile()
    program = parse(compiled.as_text())
    loops = [i for c in program.computations.values() for i in c if i.opcode == "while"]
    assert [program.trips(loop) for loop in loops] == [5]


def test_a_text_without_entry_is_refused() -> None:
    with pytest.raises(ValueError, match="ENTRY"):
        parse("HloModule nothing\n")
