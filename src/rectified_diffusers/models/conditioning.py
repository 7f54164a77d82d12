"""The conditioning of a network as a tree: its arguments other than sample and time, one tree for each prompt.

Pipelines condition their networks with tensors, lists, flags and None, nested in dictionaries. Some tensors have a
batch axis, which is not always the first. Others are shared by all prompts: position ids, rotary embeddings. Some
networks take a list with one entry for each prompt. `find_axes` reads this off two encodings of the same prompt.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

SHARED = "shared"
ROWS = "rows"
_CONTAINERS = {"dict": dict, "list": list, "tuple": tuple}


def map_leaves(tree: Any, function: Callable[[Any], Any]) -> Any:
    """Return a tree of dictionaries, lists and tuples with a function applied to its leaves."""
    if isinstance(tree, Mapping):
        return {name: map_leaves(part, function) for name, part in tree.items()}
    if isinstance(tree, (list, tuple)):
        return _CONTAINERS[_kind(tree)](map_leaves(part, function) for part in tree)
    return function(tree)


def leaves_of(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of a tree with their paths, such as `added_cond_kwargs/text_embeds`."""
    if not isinstance(tree, (Mapping, list, tuple)):
        yield path, tree
        return
    for name, part in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
        yield from leaves_of(part, f"{path}/{name}" if path else str(name))


def equal(one: Any, two: Any) -> bool:
    """Return whether two trees have the same structure and the same values."""
    if one is two:  # also spares the wait for a GPU
        return True
    if isinstance(one, Tensor) or isinstance(two, Tensor):
        both = isinstance(one, Tensor) and isinstance(two, Tensor)
        return both and one.shape == two.shape and one.dtype == two.dtype and bool(torch.equal(one, two))
    if isinstance(one, Mapping) and isinstance(two, Mapping):
        return one.keys() == two.keys() and all(equal(one[name], two[name]) for name in one)
    if isinstance(one, (list, tuple)) and isinstance(two, (list, tuple)):
        return len(one) == len(two) and all(map(equal, one, two))
    return type(one) is type(two) and bool(one == two)


def find_axes(one: Any, two: Any) -> Any:
    """Return the batch axis of every leaf: an integer, `SHARED`, or `ROWS` for a list with an entry for each prompt.

    Args:
        one: encoding of a prompt.
        two: encoding of the same prompt twice, in one batch.

    Raises:
        ValueError: the encoding of a batch is not made of its prompts' encodings, such as packed sequences. Such
            prompts cannot be joined to batches.
    """
    if isinstance(one, Mapping) and isinstance(two, Mapping) and one.keys() == two.keys():
        return {name: find_axes(part, two[name]) for name, part in one.items()}
    if isinstance(one, (list, tuple)) and isinstance(two, (list, tuple)):
        if one and len(two) == 2 * len(one):
            return ROWS
        if len(one) == len(two):
            return [find_axes(*parts) for parts in zip(one, two, strict=True)]
    if isinstance(one, Tensor) and isinstance(two, Tensor) and one.ndim == two.ndim and one.dtype == two.dtype:
        doubled = [axis for axis in range(one.ndim) if two.shape[axis] == 2 * one.shape[axis] != 0]
        others = [axis for axis in range(one.ndim) if axis not in doubled]
        if len(doubled) == 1 and all(one.shape[axis] == two.shape[axis] for axis in others):
            return doubled[0]
    if equal(one, two):
        return SHARED
    raise ValueError("a batch of prompts is not made of its prompts' encodings")


def split_rows(tree: Any, axes: Any, count: int) -> list[Any]:
    """Split the encoding of a batch of `count` prompts into the encodings of its prompts."""
    if axes == ROWS:
        each = len(tree) // count
        return [tree[i * each : (i + 1) * each] for i in range(count)]
    if isinstance(axes, int):
        return list(tree.chunk(count, axes))
    if isinstance(axes, Mapping):
        parts = {name: split_rows(part, axes[name], count) for name, part in tree.items()}
        return [{name: rows[i] for name, rows in parts.items()} for i in range(count)]
    if isinstance(axes, list):
        parts = [split_rows(part, axis, count) for part, axis in zip(tree, axes, strict=True)]
        return [_CONTAINERS[_kind(tree)](rows[i] for rows in parts) for i in range(count)]
    return [tree] * count


def join_rows(trees: Sequence[Any], axes: Any) -> Any:
    """Join encodings of prompts to the encoding of a batch; shared leaves are those of the first."""
    first = trees[0]
    if axes == ROWS:
        return _CONTAINERS[_kind(first)](part for tree in trees for part in tree)
    if isinstance(axes, int):
        return first if len(trees) == 1 else torch.cat(list(trees), axes)
    if isinstance(axes, Mapping):
        return {name: join_rows([tree[name] for tree in trees], axes[name]) for name in first}
    if isinstance(axes, list):
        joined = (join_rows([tree[i] for tree in trees], axis) for i, axis in enumerate(axes))
        return _CONTAINERS[_kind(first)](joined)
    return first


@dataclass(frozen=True)
class PromptConditioning:
    """Conditioning of prompts: a tree for each, and how trees are joined to a batch.

    Prompts are encoded one at a time, because the encoding of a text can depend on the others in its batch. Texts of
    different lengths have tensors of different shapes; `groups` joins those that fit.

    Attributes:
        trees: arguments of the network for each prompt, as for a batch of one.
        axes: as `find_axes` returns them; None if a network takes one prompt at a time.
    """

    trees: tuple[dict[str, Any], ...]
    axes: Any = None

    def __len__(self) -> int:
        return len(self.trees)

    def select(self, rows: Iterable[int]) -> "PromptConditioning":
        return replace(self, trees=tuple(self.trees[row] for row in rows))

    @staticmethod
    def concat(parts: Sequence["PromptConditioning"]) -> "PromptConditioning":
        """Return the conditioning of all prompts, in order. All parts must come from one adapter."""
        return replace(parts[0], trees=tuple(tree for part in parts for tree in part.trees))

    def to(
        self, device: str | torch.device | None = None, dtypes: Mapping[torch.dtype, torch.dtype] | None = None
    ) -> "PromptConditioning":
        """Move all tensors to a device, and convert those of some dtypes to others. Tensors shared stay shared."""
        moved: dict[int, Tensor] = {}

        def move(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            if id(leaf) not in moved:
                moved[id(leaf)] = leaf.to(device=device, dtype=(dtypes or {}).get(leaf.dtype, leaf.dtype))
            return moved[id(leaf)]

        return replace(self, trees=tuple(map_leaves(tree, move) for tree in self.trees))

    def groups(self) -> list[tuple[list[int], dict[str, Any]]]:
        """Return the batches that the network can evaluate at once: indices of the prompts and its arguments."""
        found: list[list[int]] = []
        for i, tree in enumerate(self.trees):
            fitting = (
                group for group in found if self.axes is not None and _fit(self.trees[group[0]], tree, self.axes)
            )
            group = next(fitting, None)
            if group is None:
                found.append([i])
            else:
                group.append(i)
        return [(group, join_rows([self.trees[i] for i in group], self.axes)) for group in found]

    def stack(self) -> dict[str, Tensor]:
        """Return what differs between prompts as tensors with a row for each prompt, by the leaves' paths.

        Raises:
            ValueError: the prompts have tensors of different shapes, or the tensors are numbers that float16 lacks.
        """
        rows = [dict(_own_leaves(tree, self.axes)) for tree in self.trees]
        for row in rows:
            for path, leaf in row.items():
                expected = rows[0].get(path)
                if expected is None or len(row) != len(rows[0]) or leaf.shape != expected.shape:
                    raise ValueError(
                        f"The network's argument {path} has another shape for each prompt, so that it cannot be "
                        "stored. Encode the prompts during training: leave out store_text_embeddings."
                    )
        return {path: torch.stack([row[path] for row in rows]) for path in rows[0]}

    def unstack(self, rows: Mapping[str, Tensor]) -> tuple["PromptConditioning", ...]:
        """Return the conditioning of each prompt that `stack` returned, with this one's first tree for the rest."""
        tree, count = self.trees[0], len(next(iter(rows.values())))
        own = dict(_own_leaves(tree, self.axes))
        if own.keys() - rows.keys():
            raise ValueError(
                f"The stored text embeddings lack {min(own.keys() - rows.keys())}, which this pipeline's network "
                "takes. Make the triplets again with this teacher, or without store_text_embeddings."
            )

        def build(part: Any, path: str, i: int) -> Any:
            if isinstance(part, Mapping):
                return {name: build(inner, f"{path}/{name}" if path else name, i) for name, inner in part.items()}
            if isinstance(part, (list, tuple)):
                return _CONTAINERS[_kind(part)](build(inner, f"{path}/{k}", i) for k, inner in enumerate(part))
            return rows[path][i].reshape(part.shape).to(part.dtype) if path in own else part

        return tuple(replace(self, trees=(build(tree, "", i),)) for i in range(count))

    @property
    def nbytes(self) -> int:
        tensors = {
            id(leaf): leaf.nbytes for tree in self.trees for _, leaf in leaves_of(tree) if isinstance(leaf, Tensor)
        }
        return sum(tensors.values())

    def pack(self) -> tuple[dict[str, Tensor], str]:
        """Return all tensors by name, equal ones once, and a JSON text of everything else, for `unpack`."""
        names: dict[str, str] = {}
        tensors: dict[str, Tensor] = {}

        def describe(tree: Any, name: str) -> Any:
            if isinstance(tree, Tensor):
                content = _digest(tree)
                if content not in names:
                    names[content], tensors[name] = name, tree.detach().cpu().contiguous()
                return {"tensor": names[content]}
            if isinstance(tree, Mapping):
                return {"dict": {key: describe(part, f"{name}/{key}") for key, part in tree.items()}}
            if isinstance(tree, (list, tuple)):
                return {_kind(tree): [describe(part, f"{name}/{i}") for i, part in enumerate(tree)]}
            if tree is not None and not isinstance(tree, (bool, int, float, str)):
                raise TypeError(
                    f"The argument {name.partition('/')[2]} of the network is a {type(tree).__name__}, which cannot "
                    "be stored. Encode the prompts during training instead."
                )
            return {"value": tree}

        trees = [describe(tree, str(i)) for i, tree in enumerate(self.trees)]
        return tensors, json.dumps({"trees": trees, "axes": self.axes})

    @classmethod
    def unpack(cls, tensors: Mapping[str, Tensor], text: str) -> "PromptConditioning":
        """Return the conditioning that `pack` described."""

        def build(tree: Any) -> Any:
            ((kind, content),) = tree.items()
            if kind == "tensor":
                return tensors[content]
            if kind == "value":
                return content
            if kind == "dict":
                return {name: build(part) for name, part in content.items()}
            return _CONTAINERS[kind](build(part) for part in content)

        stored = json.loads(text)
        return cls(tuple(build(tree) for tree in stored["trees"]), stored["axes"])


def concat(parts: Sequence[Any]) -> Any:
    """Join conditionings, of tensors by name or of trees, in order."""
    if isinstance(parts[0], PromptConditioning):
        return PromptConditioning.concat(parts)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def repeat(conditioning: Any, count: int) -> Any:
    """Return a conditioning of one row, or of `count` rows already, with `count` rows."""
    if isinstance(conditioning, PromptConditioning):
        return conditioning if len(conditioning) == count else conditioning.select([0] * count)
    return {name: part.expand(count, *part.shape[1:]) for name, part in conditioning.items()}


def named_tensors(conditioning: Any) -> dict[str, Tensor]:
    """Return the tensors of a conditioning by name; of trees, those of each prompt."""
    if not isinstance(conditioning, PromptConditioning):
        return conditioning
    leaves = (
        (f"{path} of prompt {i}", leaf) for i, tree in enumerate(conditioning.trees) for path, leaf in leaves_of(tree)
    )
    return {name: leaf for name, leaf in leaves if isinstance(leaf, Tensor)}


def _own_leaves(tree: Any, axes: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a prompt that are not shared, without the batch axis; all of them if axes are None."""
    if isinstance(tree, (Mapping, list, tuple)):
        for name, part in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
            inner = axes[name] if isinstance(axes, (Mapping, list)) else axes
            yield from _own_leaves(part, inner, f"{path}/{name}" if path else str(name))
    elif isinstance(tree, Tensor) and axes != SHARED:
        yield path, tree.squeeze(axes) if isinstance(axes, int) else tree


def _kind(tree: Any) -> str:
    return "tuple" if isinstance(tree, tuple) else "list"


def _fit(one: Any, two: Any, axes: Any) -> bool:
    """Return whether two prompts can be in one batch: equal shapes but for the batch axis, equal shared leaves."""
    if axes == ROWS:
        return True
    if isinstance(axes, int):
        return one.dtype == two.dtype and one.shape == two.shape
    if isinstance(axes, Mapping):
        return one.keys() == two.keys() and all(_fit(one[name], two[name], axis) for name, axis in axes.items())
    if isinstance(axes, list):
        return len(one) == len(two) == len(axes) and all(map(_fit, one, two, axes))
    return equal(one, two)


def _digest(tensor: Tensor) -> str:
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.blake2b(f"{tensor.dtype}{tuple(tensor.shape)}".encode() + content).hexdigest()
