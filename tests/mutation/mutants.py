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


@dataclass(frozen=True)
class Mutant:
    """One change: in which function of which file, from what to what, and where that is."""

    path: str
    function: str
    before: str
    after: str
    number: int  # among those that read alike
    spot: "ast.expr | ast.stmt"
    change: "ast.expr | ast.stmt"
    source: ast.Module

    @property
    def name(self) -> str:
        again = f" ({self.number})" if self.number > 1 else ""
        return f"{self.path}: {self.function}: {self.before} -> {self.after}{again}"

    @property
    def lines(self) -> range:
        return range(self.spot.lineno, (self.spot.end_lineno or self.spot.lineno) + 1)

    @property
    def tree(self) -> ast.Module:
        """The whole file with the change."""
        tree = copy.deepcopy(self.source)
        replace = _Replace(self.spot, ast.copy_location(copy.deepcopy(self.change), self.spot))
        replace.visit(tree)
        if replace.count != 1:
            raise ValueError(f"{self.before} was found {replace.count} times in line {self.spot.lineno}.")
        return ast.fix_missing_locations(tree)


def mutants_of(source: str, path: str) -> Iterator[Mutant]:
    """Yield the mutants of all functions in a file, in the order of its text.

    Comparisons, arithmetic, logic and numbers are changed, texts outside of errors too, conditions turned round,
    keyword arguments, statements and raises left out, results replaced by None. Left as they are: annotations,
    defaults, decorators, what an error says, and what only type checkers read.
    """
    seen: dict[str, int] = {}
    tree = ast.parse(source)
    for function, place in _functions(tree, ""):
        for node in function.body[1:] if ast.get_docstring(function) is not None else function.body:
            for spot, change in _changes(node):
                before, after = _short(spot), _short(ast.copy_location(change, spot))
                text = f"{place}: {before} -> {after}"
                seen[text] = seen.get(text, 0) + 1
                yield Mutant(path, place, before, after, seen[text], spot, change, tree)


def _functions(node: ast.AST, place: str) -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef, str]]:
    """Yield the functions of modules and classes; those inside others belong to these."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, _FUNCTIONS):
            yield child, f"{place}{child.name}"
        elif isinstance(child, ast.ClassDef):
            yield from _functions(child, f"{place}{child.name}.")
        elif isinstance(child, (ast.If, ast.Try)):
            yield from _functions(child, place)


def _changes(node: ast.AST) -> Iterator[tuple["ast.expr | ast.stmt", "ast.expr | ast.stmt"]]:
    """Yield a node and each thing that may stand in its place, for everything from this node on downwards."""
    if isinstance(node, ast.Raise):
        yield node, ast.Pass()
        return
    if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Call) and _is_error(node.func)):
        return
    if isinstance(node, (ast.expr, ast.stmt)):
        for change in _of(node):
            yield node, change
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "args" if isinstance(node, _FUNCTIONS) else ""):
            continue
        inner = value if isinstance(value, list) else [value]
        if isinstance(node, _FUNCTIONS) and name == "body" and ast.get_docstring(node) is not None:
            inner = inner[1:]
        for child in inner:
            if isinstance(child, ast.AST):
                yield from _changes(child)


def _of(node: "ast.expr | ast.stmt") -> "Iterator[ast.expr | ast.stmt]":
    if isinstance(node, ast.Compare):
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
        for i in range(len(node.keywords)):
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
    elif isinstance(node, (ast.Break, ast.Continue)):
        yield ast.Pass()


def _constants(value: object) -> Iterator[ast.Constant]:
    if isinstance(value, bool):
        yield ast.Constant(not value)
    elif isinstance(value, (int, float)):
        yield ast.Constant(value + 1)
        if value:
            yield ast.Constant(type(value)(0))
    elif isinstance(value, str):
        yield ast.Constant(f"{value}X")


def _is_error(called: ast.expr) -> bool:
    return isinstance(called, ast.Name) and called.id.endswith(("Error", "Warning"))


class _Replace(ast.NodeTransformer):
    """Replace the node that is at the same place and reads alike."""

    def __init__(self, spot: ast.AST, change: ast.AST) -> None:
        self.key, self.change, self.count = _key(spot), change, 0

    def visit(self, node: ast.AST) -> ast.AST:
        if _key(node) == self.key:
            self.count += 1
            return self.change
        return self.generic_visit(node)


def _key(node: ast.AST) -> tuple[object, ...]:
    places = (getattr(node, name, None) for name in ("lineno", "col_offset", "end_lineno", "end_col_offset"))
    return (type(node), *places)


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
        for code in _codes(compile(mutant.tree, file, "exec")):
            for function in self.known.get((file, code.co_firstlineno, code.co_name), ()):
                free = function.__code__.co_freevars
                if set(code.co_freevars) <= set(free):  # fewer where a mutant has lost its `super()`
                    function.__code__ = code if code.co_freevars else code.replace(co_freevars=free)


def _codes(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from _codes(constant)
