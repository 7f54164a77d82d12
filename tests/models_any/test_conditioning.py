"""Conditioning as a tree: batch axes are found, rows are joined and split without loss, and stored."""

import copy

import pytest
import torch

from rectified_diffusers.models.conditioning import (
    ROWS,
    SHARED,
    PromptConditioning,
    equal,
    find_axes,
    join_rows,
    split_rows,
)


def encoding(count: int, tokens: int = 5) -> dict:
    """Encode `count` equal prompts as no pipeline does: batch axes 0 and 1, a list of rows, shared leaves."""
    generator = torch.Generator().manual_seed(tokens)
    embeds = torch.randn(1, tokens, 4, generator=generator)
    return {
        "embeds": embeds.expand(count, -1, -1).clone(),
        "layers": torch.stack([embeds, 2 * embeds]).expand(-1, count, -1, -1).clone(),
        "rows": [embeds[0].clone() for _ in range(count)],
        "added": {"pooled": embeds.mean(1).expand(count, -1).clone(), "sizes": (torch.ones(3), None)},
        "ids": torch.arange(tokens),
        "flag": True,
    }


AXES = {
    "embeds": 0,
    "layers": 1,
    "rows": ROWS,
    "added": {"pooled": 0, "sizes": [SHARED, SHARED]},
    "ids": SHARED,
    "flag": SHARED,
}


def test_axes_are_found() -> None:
    assert find_axes(encoding(1), encoding(2)) == AXES


def test_a_batch_that_is_not_made_of_rows_is_an_error() -> None:
    packed = {"lengths": torch.tensor([0, 5])}, {"lengths": torch.tensor([0, 5, 10])}
    with pytest.raises(ValueError, match="not made of its prompts"):
        find_axes(*packed)
    with pytest.raises(ValueError, match="not made of its prompts"):
        find_axes({"count": 1}, {"count": 2})


def test_joined_rows_split_into_themselves() -> None:
    rows = [encoding(1), encoding(1)]
    joined = join_rows(rows, AXES)
    assert equal(joined, encoding(2))
    assert all(equal(one, two) for one, two in zip(split_rows(joined, AXES, 2), rows, strict=True))


def test_prompts_are_grouped_by_length() -> None:
    conditioning = PromptConditioning(tuple(encoding(1, tokens) for tokens in (5, 7, 5)), AXES)
    groups = conditioning.groups()
    assert [rows for rows, _ in groups] == [[0, 2], [1]]
    assert groups[0][1]["layers"].shape == (2, 2, 5, 4)
    one_at_a_time = PromptConditioning(conditioning.trees, None).groups()
    assert [rows for rows, _ in one_at_a_time] == [[0], [1], [2]]


def test_selected_and_concatenated_prompts_keep_their_order() -> None:
    parts = [PromptConditioning((encoding(1, tokens),), AXES) for tokens in (3, 4, 5)]
    together = PromptConditioning.concat(parts)
    assert len(together) == 3
    assert [len(tree["ids"]) for tree in together.select([2, 0]).trees] == [5, 3]


def test_shared_tensors_stay_one_when_moved() -> None:
    ids = torch.arange(5.0)
    trees = tuple({"embeds": torch.zeros(1, 2, dtype=torch.bfloat16), "ids": ids} for _ in range(2))
    moved = PromptConditioning(trees, {"embeds": 0, "ids": SHARED}).to("cpu", {torch.bfloat16: torch.float32})
    assert moved.trees[0]["ids"] is moved.trees[1]["ids"]
    assert [moved.trees[0][name].dtype for name in ("embeds", "ids")] == [torch.float32, torch.float32]
    assert moved.nbytes == 2 * 2 * 4 + 5 * 4


def test_stored_trees_are_equal_and_equal_tensors_are_stored_once() -> None:
    conditioning = PromptConditioning((encoding(1), copy.deepcopy(encoding(1))), AXES)
    tensors, text = conditioning.pack()
    again = PromptConditioning.unpack(tensors, text)
    assert equal(list(again.trees), list(conditioning.trees))
    assert again.axes == conditioning.axes
    assert len(tensors) == len({id(tensor) for tensor in tensors.values()})
    assert not [name for name in tensors if name.startswith("1/")]


def test_what_cannot_be_stored_is_an_error() -> None:
    with pytest.raises(TypeError, match="mask_function of the network is a function"):
        PromptConditioning(({"mask_function": lambda: None},), {"mask_function": SHARED}).pack()
