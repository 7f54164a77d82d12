"""Small changes of functions: what can be changed in a file, and how to let a running process have the change."""

import ast
import copy
import gc
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType

_OPERATORS: Mapping[type, tuple[type, ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
    ast.Add: (ast.Sub,),
    ast.Sub: (ast.Add,),
    ast.Mult: (ast.Div,),
    ast.Div: (ast.Mult,),
    ast.FloorDiv: (ast.Mult,),
    ast.Mod: (ast.Mult,),
    ast.Pow: (ast.Mult,),
    ast.LShift: (ast.RShift,),
    ast.RShift: (ast.LShift,),
    ast.BitAnd: (ast.BitOr,),
    ast.BitOr: (ast.BitAnd,),
    ast.And: (ast.Or,),
    ast.Or: (ast.And,),
}
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


# Keywords that no test on a CPU can miss, or that guard what is so by construction; neither left out nor changed.
_KEYWORDS_LEFT = ("device", "encoding", "missing_ok", "non_blocking", "strict")


@dataclass(frozen=True)
class Mutant:
    """One change: in which function of which file, from what to what, and where that is."""

    path: str
    function: str
    number: int  # among those that read alike
    place: "_Place"
    change: "ast.expr | ast.stmt"
    source: ast.Module

    @property
    def name(self) -> str:
        again = f" ({self.number})" if self.number > 1 else ""
        return f"{self.path}: {self.function}: {_short(self.place.node)} -> {_short(self.change)}{again}"

    @property
    def lines(self) -> range:
        return range(self.place.node.lineno, (self.place.node.end_lineno or self.place.node.lineno) + 1)

    def compile(self, file: str) -> CodeType:
        """Compile the whole file with the change."""
        self.place.put(self.change)
        try:
            return compile(ast.fix_missing_locations(self.source), file, "exec")
        finally:
            self.place.put(self.place.node)


@dataclass(frozen=True)
class _Place:
    """A node, and where its parent has it."""

    node: "ast.expr | ast.stmt"
    parent: ast.AST
    field: str
    index: int | None

    def put(self, node: ast.AST) -> None:
        if self.index is None:
            setattr(self.parent, self.field, node)
        else:
            getattr(self.parent, self.field)[self.index] = node


def mutants_of(source: str, path: str) -> Iterator[Mutant]:
    """Yield the mutants of all functions in a file, in the order of its text.

    Comparisons, arithmetic, logic and numbers are changed, texts outside of errors too, conditions negated, keyword
    arguments, statements and raises left out, results replaced by None. Left as they are: annotations, defaults,
    decorators, the texts of errors, `_KEYWORDS_LEFT`, and what only type checkers read.
    """
    seen: dict[str, int] = {}
    tree = ast.parse(source)
    for function, name in _functions(tree, ""):
        for place, change in _changes(function):
            ast.copy_location(change, place.node)
            text = f"{name}: {_short(place.node)} -> {_short(change)}"
            seen[text] = seen.get(text, 0) + 1
            yield Mutant(path, name, seen[text], place, change, tree)


def _functions(node: ast.AST, place: str) -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef, str]]:
    """Yield the functions of modules and classes; those inside others belong to these."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, _FUNCTIONS):
            yield child, f"{place}{child.name}"
        elif isinstance(child, ast.ClassDef):
            yield from _functions(child, f"{place}{child.name}.")
        elif isinstance(child, (ast.If, ast.Try)):
            yield from _functions(child, place)


def _changes(parent: ast.AST) -> "Iterator[tuple[_Place, ast.expr | ast.stmt]]":
    """Yield every place below a node with each thing that may stand there instead."""
    is_function = isinstance(parent, _FUNCTIONS)
    left = ("annotation", "returns", "decorator_list", *(["args"] if is_function else []))
    for name, value in ast.iter_fields(parent):
        if name in left:
            continue
        first = int(is_function and name == "body" and ast.get_docstring(parent) is not None)
        children = list(enumerate(value))[first:] if isinstance(value, list) else [(None, value)]
        for index, child in children:
            if not isinstance(child, ast.AST) or _is_left(child):
                continue
            if isinstance(child, (ast.expr, ast.stmt)):
                for change in _of(child):
                    yield _Place(child, parent, name, index), change
            if not isinstance(child, ast.Raise):
                yield from _changes(child)


def _of(node: "ast.expr | ast.stmt") -> "Iterator[ast.expr | ast.stmt]":
    if isinstance(node, (ast.Raise, ast.Break, ast.Continue)):
        yield ast.Pass()
    elif isinstance(node, ast.Compare):
        for i, operator in enumerate(node.ops):
            for other in _OPERATORS[type(operator)]:
                yield ast.Compare(node.left, [*node.ops[:i], other(), *node.ops[i + 1 :]], node.comparators)
    elif isinstance(node, ast.BinOp):
        for other in _OPERATORS.get(type(node.op), ()):
            yield ast.BinOp(node.left, other(), node.right)
    elif isinstance(node, ast.BoolOp):
        for other in _OPERATORS[type(node.op)]:
            yield ast.BoolOp(other(), node.values)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub, ast.Invert)):
        yield node.operand
    elif isinstance(node, ast.Constant):
        yield from _constants(node.value)
    elif isinstance(node, ast.Call):
        for i in (i for i, keyword in enumerate(node.keywords) if not _is_left(keyword)):
            yield ast.Call(node.func, node.args, [*node.keywords[:i], *node.keywords[i + 1 :]])
    elif isinstance(node, (ast.IfExp, ast.If, ast.While)):
        changed = copy.copy(node)
        changed.test = ast.UnaryOp(ast.Not(), node.test)
        yield changed
    elif isinstance(node, ast.AugAssign):
        for other in _OPERATORS.get(type(node.op), ()):
            yield ast.AugAssign(node.target, other(), node.value)
    elif isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant):
        yield ast.Pass()
    elif isinstance(node, ast.Return) and node.value is not None:
        yield ast.Return(ast.Constant(None))


def _constants(value: object) -> Iterator[ast.Constant]:
    if isinstance(value, bool):
        yield ast.Constant(not value)
    elif isinstance(value, (int, float)):
        yield ast.Constant(value + 1)
        if value:
            yield ast.Constant(type(value)(0))
    elif isinstance(value, str):
        yield ast.Constant(f"{value}X")


def _is_left(node: ast.AST) -> bool:
    """Whether a node stays as it is: formatted texts, errors and their texts, and some keywords."""
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id.endswith(("Error", "Warning"))
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.keyword) and node.arg in _KEYWORDS_LEFT)


def _short(node: ast.AST) -> str:
    """Return a node as text; of a statement with others inside, the first line."""
    return ast.unparse(node).splitlines()[0]


class Functions:
    """The functions of some files that are alive in this process; a mutant takes their place in a fork of it."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self.files = {path: str(file) for path, file in files.items()}
        wanted = set(self.files.values())
        self.known: dict[tuple[str, int, str], list[FunctionType]] = {}
        gc.unfreeze()  # what tests/conftest.py has frozen would not be among them
        for each in gc.get_objects():
            if isinstance(each, FunctionType) and (code := each.__code__).co_filename in wanted:
                self.known.setdefault((code.co_filename, code.co_firstlineno, code.co_name), []).append(each)

    def become(self, mutant: Mutant) -> None:
        """Replace the code of every function in the mutant's file with the mutant's code."""
        file = self.files[mutant.path]
        for code in _codes(mutant.compile(file)):
            for function in self.known.get((file, code.co_firstlineno, code.co_name), ()):
                free = function.__code__.co_freevars
                if set(code.co_freevars) <= set(free):  # fewer where a mutant has lost its `super()`
                    function.__code__ = code if code.co_freevars else code.replace(co_freevars=free)


def _codes(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from _codes(constant)
