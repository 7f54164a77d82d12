"""The conditioning of a network as a tree: its arguments other than sample and time, one tree for each prompt.

Pipelines condition their networks with tensors, lists, flags and None, nested in dictionaries. Some tensors have a
batch axis, which is not always the first. Others are shared by all prompts: position ids, rotary embeddings. Some
networks take a list with one entry for each prompt. `find_axes` reads this off two encodings of the same prompt.
"""

import copy
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

SHARED = "shared"
ROWS = "rows"
_CONTAINERS = {"list": list, "tuple": tuple}


def parts_of(tree: Any) -> dict[Any, Any] | None:
    """Return the parts of a mapping, dataclass, list or tuple by name or index; None for a leaf."""
    if is_dataclass(tree) and not isinstance(tree, type):
        return {part.name: getattr(tree, part.name) for part in fields(tree)}
    if isinstance(tree, Mapping):
        return dict(tree)
    if isinstance(tree, tuple) and hasattr(tree, "_asdict"):  # a named tuple
        return tree._asdict()  # pyright: ignore[reportAttributeAccessIssue]
    return dict(enumerate(tree)) if isinstance(tree, (list, tuple)) else None


def rebuild(tree: Any, parts: Mapping[Any, Any]) -> Any:
    """Return a container of the same kind with other parts."""
    if is_dataclass(tree):
        made = copy.copy(tree)
        frozen = type(tree).__dataclass_params__.frozen  # pyright: ignore[reportAttributeAccessIssue]
        for name, part in parts.items():
            (object.__setattr__ if frozen else setattr)(made, name, part)
        return made
    if type(tree) is dict:
        return dict(parts)
    if isinstance(tree, Mapping):
        made: Any = copy.copy(tree)
        for name, part in parts.items():
            made[name] = part
        return made
    return type(tree)(*parts.values()) if hasattr(tree, "_fields") else type(tree)(parts.values())


def map_leaves(tree: Any, function: Callable[[Any], Any]) -> Any:
    """Return a tree of mappings, dataclasses, lists and tuples with a function applied to its leaves."""
    parts = parts_of(tree)
    if parts is None:
        return function(tree)
    return rebuild(tree, {name: map_leaves(part, function) for name, part in parts.items()})


def leaves_of(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of a tree with their paths, such as `added_cond_kwargs/text_embeds`."""
    parts = parts_of(tree)
    if parts is None:
        yield path, tree
    for name, part in (parts or {}).items():
        yield from leaves_of(part, f"{path}/{name}" if path else str(name))


def equal(one: Any, two: Any) -> bool:
    """Return whether two trees have the same structure and the same values."""
    if one is two:  # also spares the wait for a GPU
        return True
    if isinstance(one, Tensor) or isinstance(two, Tensor):
        both = isinstance(one, Tensor) and isinstance(two, Tensor)
        return both and one.shape == two.shape and one.dtype == two.dtype and bool(torch.equal(one, two))
    if isinstance(one, np.ndarray) or isinstance(two, np.ndarray):
        return bool(np.array_equal(one, two))
    parts, others = parts_of(one), parts_of(two)
    if parts is not None and others is not None:
        return parts.keys() == others.keys() and all(equal(parts[name], others[name]) for name in parts)
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
    parts, others = parts_of(one), parts_of(two)
    if parts is not None and others is not None:
        if _is_plain(one) and _is_plain(two) and one and len(two) == 2 * len(one):
            return ROWS
        if parts.keys() == others.keys():
            axes = {name: find_axes(part, others[name]) for name, part in parts.items()}
            return list(axes.values()) if _is_plain(one) else axes
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
    parts = parts_of(tree)
    if parts is None or axes == SHARED:
        return [tree] * count
    split = {name: split_rows(part, axes[name], count) for name, part in parts.items()}
    return [rebuild(tree, {name: rows[i] for name, rows in split.items()}) for i in range(count)]


def join_rows(trees: Sequence[Any], axes: Any) -> Any:
    """Join encodings of prompts to the encoding of a batch; shared leaves are those of the first."""
    first = trees[0]
    if len(trees) == 1:
        return first
    if axes == ROWS:
        return type(first)(part for tree in trees for part in tree)
    if isinstance(axes, int):
        return torch.cat(list(trees), axes)
    parts = [parts_of(tree) for tree in trees]
    if axes == SHARED or parts[0] is None:
        return first
    return rebuild(first, {name: join_rows([part[name] for part in parts if part], axes[name]) for name in parts[0]})


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
            inner = parts_of(part)
            if inner is not None:
                built = {name: build(leaf, f"{path}/{name}" if path else str(name), i) for name, leaf in inner.items()}
                return rebuild(part, built)
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
            if type(tree) is dict:
                return {"dict": {key: describe(part, f"{name}/{key}") for key, part in tree.items()}}
            if type(tree) in (list, tuple):
                return {type(tree).__name__: [describe(part, f"{name}/{i}") for i, part in enumerate(tree)]}
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
    for name, part in (parts_of(tree) or {}).items():
        inner = axes.get(name) if isinstance(axes, Mapping) else axes[name] if isinstance(axes, list) else axes
        yield from _own_leaves(part, inner, f"{path}/{name}" if path else str(name))
    if isinstance(tree, Tensor) and axes != SHARED:
        yield path, tree.squeeze(axes) if isinstance(axes, int) else tree


def _is_plain(tree: Any) -> bool:
    return isinstance(tree, (list, tuple)) and not hasattr(tree, "_fields")


def _fit(one: Any, two: Any, axes: Any) -> bool:
    """Return whether two prompts can be in one batch: equal shapes but for the batch axis, equal shared leaves."""
    if axes == ROWS:
        return _is_plain(one) and _is_plain(two)
    if isinstance(axes, int):
        both = isinstance(one, Tensor) and isinstance(two, Tensor)
        return both and one.dtype == two.dtype and one.shape == two.shape
    parts, others = parts_of(one), parts_of(two)
    if axes == SHARED or parts is None or others is None:
        return equal(one, two)
    names = axes.keys() if isinstance(axes, Mapping) else range(len(axes))
    same = parts.keys() == others.keys() == set(names)
    return same and all(_fit(parts[name], others[name], axes[name]) for name in names)


def _digest(tensor: Tensor) -> str:
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.blake2b(f"{tensor.dtype}{tuple(tensor.shape)}".encode() + content).hexdigest()
