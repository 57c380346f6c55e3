"""Division of blocks into scanned stacks."""

import pytest

from dsr_jax.models.depth import Stack, TokenRows, split_into_stacks, token_rows


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


@pytest.mark.parametrize(
    ("insertions", "rows"),
    [
        ({}, [(0, (0, 0))]),
        ({"reg": (2, 4)}, [(0, (0, 0)), (4, (0, 4))]),
        ({"ctx": (4, 3), "reg": (2, 4)}, [(0, (0, 0)), (4, (0, 4)), (7, (3, 4))]),
        ({"ctx": (2, 3), "reg": (4, 4)}, [(0, (0, 0)), (3, (0, 0)), (7, (0, 4))]),
        ({"ctx": (2, 3), "reg": (2, 4)}, [(0, (0, 0)), (7, (0, 4))]),
    ],
)
def test_rows_of_tokens_by_stack(insertions, rows):
    stacks = split_into_stacks(6, {kind: first for kind, (first, _) in insertions.items()})
    want = [TokenRows(stack, *each) for stack, each in zip(stacks, rows, strict=True)]
    assert list(token_rows(stacks, insertions)) == want
