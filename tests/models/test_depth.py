"""Division of blocks into scanned stacks."""

import pytest

from dsr_jax.models.depth import Stack, split_into_stacks


@pytest.mark.parametrize(
    ("insertions", "stacks"),
    [
        ({}, [("blocks", 0, 6)]),
        ({"reg": 0}, [("blocks_reg", 0, 6)]),
        ({"reg": 2}, [("blocks_pre", 0, 2), ("blocks_reg", 2, 6)]),
        ({"ctx": 1, "reg": 4}, [("blocks_pre", 0, 1), ("blocks_ctx", 1, 4), ("blocks_reg", 4, 6)]),
        ({"ctx": 4, "reg": 1}, [("blocks_pre", 0, 1), ("blocks_reg", 1, 4), ("blocks_ctx", 4, 6)]),
        ({"ctx": 3, "reg": 3}, [("blocks_pre", 0, 3), ("blocks_reg", 3, 6)]),
        ({"ctx": 0, "reg": 5}, [("blocks_ctx", 0, 5), ("blocks_reg", 5, 6)]),
    ],
)
def test_a_stack_begins_where_tokens_are_inserted(insertions, stacks):
    assert split_into_stacks(6, insertions) == tuple(Stack(*stack) for stack in stacks)


def test_names_take_a_prefix():
    assert [stack.name for stack in split_into_stacks(3, {"reg": 1}, "enc_")] == [
        "enc_blocks_pre",
        "enc_blocks_reg",
    ]
