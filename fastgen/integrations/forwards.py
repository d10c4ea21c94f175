"""Any module's own forward, as it is written: GroupNorm, SiLU and convolution in a row as one call.

The forward is compiled once more from its source, for a subclass, with the calls that stand directly around one another,
`self.conv(F.silu(self.norm(x)))`, or one after another on one name, `h = self.norm(x)` before `h = self.act(h)`, handed to
`in_a_row` together. Each is looked up as it was, once and in that order, and what is found decides, at every call, whether several
are one. All else is their code.

Not by a trace (torch.fx): that is the way of one call. `if self.training`, a flag of the module or of its file, the kind of an
argument are decided when it is made, and nothing tells when they change. What stands in the source holds for every call.
"""

import __future__

import ast
import functools
import inspect
import itertools
import operator
import types
from abc import ABCMeta
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import nn

from .fusing import in_a_row, is_silu
from .stand_in import StandIn

RUN = "__fastgen_in_a_row__"
# Of the flags of code, those of `from __future__ import`; the first feature is as old as nested functions.
FEATURES = (getattr(__future__, name).compiler_flag for name in __future__.all_feature_names[1:])
FUTURE = functools.reduce(operator.or_, FEATURES)


class Forward(StandIn):
    of, project, does = "Module", "torch", "GroupNorm, SiLU and convolution in its forward as one call"

    @classmethod
    def concerns(cls, module: Any) -> bool:
        names = {part for path in norms_near(module) for part in path}
        code = getattr(getattr(type(module), "forward", None), "__code__", None)
        if code is None or names.isdisjoint(code.co_names):
            return False  # before its file is read
        made = rewritten(type(module).forward)
        return made is not None and any(meets(module, row) for row in made.rows)

    @classmethod
    def reasons(cls, module: Any) -> Iterator[str]:
        kind = type(module)
        if kind.__reduce_ex__ is not object.__reduce_ex__ or kind.__reduce__ is not object.__reduce__:
            yield "its class is copied and pickled in a way of its own"
        if type(kind) not in (type, ABCMeta) or any("__init_subclass__" in vars(base) for base in kind.__mro__[:-1]):
            yield "its class looks at what is derived from it"

    @classmethod
    def members(cls, parent: type) -> dict[str, Any]:
        made = rewritten(parent.forward)  # type: ignore[attr-defined]
        return {} if made is None else {"forward": made.forward}


class Rewritten(NamedTuple):
    """A forward with its rows handed to `in_a_row`, and the rows: what is called in each, from the first to the last, as its path
    from ``self``, which is empty for silu."""

    forward: Callable[..., Any]
    rows: list[list[tuple[Any, ...]]]


def rewritten(forward: Any) -> Rewritten | None:
    """``forward`` with its rows as one; None where it has none, or its source is not what runs (decorated, changed, not there)."""
    return _rewritten(forward) if type(forward) is types.FunctionType and not hasattr(forward, "__wrapped__") else None


@functools.cache
def _rewritten(function: Any) -> Rewritten | None:
    code = function.__code__
    definition = definition_of(function)
    if definition is None or not code.co_argcount:
        return None
    found = Rows(function)
    definition.body = found.statements(definition.body)
    if not found.rows or any(
        isinstance(node, ast.Name) and node.id == found.self_name and not isinstance(node.ctx, ast.Load)
        for node in ast.walk(definition)
    ):
        return None
    new = compiled(definition, code)
    cells = dict(zip(code.co_freevars, function.__closure__ or (), strict=True)) | {RUN: types.CellType(run)}
    closure = tuple(cells[name] for name in new.co_freevars)
    made = types.FunctionType(new, function.__globals__, function.__name__, function.__defaults__, closure)
    annotations = (
        "__annotate__" if hasattr(function, "__annotate__") else "__annotations__"
    )  # those nobody has asked for yet
    for name in ("__kwdefaults__", annotations, "__doc__", "__qualname__", "__module__"):
        setattr(made, name, getattr(function, name))
    vars(made).update(vars(function))
    return Rewritten(made, found.rows)


def run(calls: tuple[Any, ...], input: Any, *later: Callable[[], tuple[Any, ...]]) -> Any:
    """What a row becomes: ``calls`` as they are written, the last first, and what later statements call."""

    def one_by_one() -> Iterator[Any]:
        yield from reversed(calls)
        for look_up in later:
            yield from reversed(look_up())

    return in_a_row(one_by_one(), input)


class Rows(ast.NodeTransformer):
    """Finds rows, and puts a call of :func:`run` in their place.

    A row calls nothing but attributes of ``self`` and silu, with one argument each. Statements are taken together where the name
    that they pass on is a local that nothing else can see in between: none of an inner function, and not in a `try` or `with`,
    after which it could be read half done.
    """

    def __init__(self, function: Any) -> None:
        code = function.__code__
        self.rows: list[list[tuple[Any, ...]]] = []
        self.self_name = code.co_varnames[0]
        self.globals = function.__globals__
        self.locals = set(code.co_varnames) - set(code.co_cellvars)
        self.hidden = set(code.co_varnames) | set(code.co_cellvars) | set(code.co_freevars)
        self.guarded = False

    def statements(self, body: list[ast.stmt]) -> list[ast.stmt]:
        done: list[ast.stmt] = []
        left = list(body)
        while left:
            statement = left.pop(0)
            calls, inner = self.chain(getattr(statement, "value", None))
            later: list[list[ast.expr]] = []
            last: Any = statement
            while left and calls and isinstance(last, ast.Assign) and not self.guarded:
                more, of = self.chain(getattr(left[0], "value", None))
                ends = isinstance(left[0], ast.Return) or target(left[0]) == target(last)
                if not (more and ends and self.passes_on(last, of)):
                    break
                later.append(more)
                last = left.pop(0)
            if later:
                self.note([calls, *later])
                last.value = as_run(calls, self.visit(inner), later)
            done.append(last if later else self.visit(statement))
        return done

    def passes_on(self, statement: ast.Assign, argument: ast.expr | None) -> bool:
        """Whether ``argument`` is the local name that the statement assigns to."""
        name = target(statement)
        return isinstance(argument, ast.Name) and argument.id == name and name in self.locals

    def chain(self, node: Any) -> tuple[list[ast.expr], Any]:
        """What is called in `f(g(x))`, as written, and x."""
        calls: list[ast.expr] = []
        while isinstance(node, ast.Call) and len(node.args) == 1 and not node.keywords and self.is_known(node.func):
            if isinstance(node.args[0], ast.Starred):
                break
            calls.append(node.func)
            node = node.args[0]
        return calls, node

    def is_known(self, function: ast.expr) -> bool:
        path = path_of(function)
        if path is None or path[0] in self.hidden:
            return path is not None and path[0] == self.self_name and len(path) > 1
        found = self.globals.get(path[0])
        for name in path[1:]:
            found = getattr(found, name, None) if isinstance(found, types.ModuleType) else None
        return found is F.silu

    def note(self, statements: list[list[ast.expr]]) -> None:
        paths = (path_of(call) or () for calls in statements for call in reversed(calls))
        self.rows.append([path[1:] if path[0] == self.self_name else () for path in paths])

    def visit_Call(self, node: ast.Call) -> Any:
        calls, inner = self.chain(node)
        if len(calls) < 2:
            return self.generic_visit(node)
        self.note([calls])
        return as_run(calls, self.visit(inner), [])

    def generic_visit(self, node: Any) -> Any:
        for field, value in ast.iter_fields(node):
            if isinstance(value, list) and value and isinstance(value[0], ast.stmt):
                setattr(node, field, self.statements(value))
            elif isinstance(value, list):
                setattr(node, field, [self.visit(each) if isinstance(each, ast.AST) else each for each in value])
            elif isinstance(value, ast.AST):
                setattr(node, field, self.visit(value))
        return node

    def visit_guarded(self, node: ast.AST) -> ast.AST:
        before, self.guarded = self.guarded, True
        self.generic_visit(node)
        self.guarded = before
        return node

    visit_Try = visit_TryStar = visit_With = visit_AsyncWith = visit_guarded

    def visit_scope(self, node: ast.AST) -> ast.AST:
        return node  # its names are others

    visit_FunctionDef = visit_AsyncFunctionDef = visit_Lambda = visit_ClassDef = visit_scope
    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = visit_scope


def target(statement: ast.stmt) -> str | None:
    """The one name that a statement assigns to."""
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1 and isinstance(statement.targets[0], ast.Name):
        return statement.targets[0].id
    return None


def path_of(expression: ast.expr) -> tuple[Any, ...] | None:
    """`self.blocks[0].norm` as its parts; None of anything else."""
    if isinstance(expression, ast.Name):
        return (expression.id,)
    below = path_of(expression.value) if isinstance(expression, (ast.Attribute, ast.Subscript)) else None
    if below is None:
        return None
    if isinstance(expression, ast.Attribute):
        return (*below, expression.attr)
    index = getattr(expression, "slice", None)
    return (*below, index.value) if isinstance(index, ast.Constant) and isinstance(index.value, (int, str)) else None


def as_run(calls: list[ast.expr], inner: ast.expr, later: list[list[ast.expr]]) -> ast.Call:
    nothing = ast.arguments(posonlyargs=[], args=[], kwonlyargs=[], kw_defaults=[], defaults=[])
    thunks = [ast.Lambda(nothing, ast.Tuple(each, ast.Load())) for each in later]
    call = ast.Call(ast.Name(RUN, ast.Load()), [ast.Tuple(calls, ast.Load()), inner, *thunks], [])
    return ast.copy_location(call, calls[0])


def meets(module: nn.Module, row: list[tuple[Any, ...]]) -> bool:
    """Whether in this module a GroupNorm comes before SiLU in this row."""
    found = [resolved(module, path) if path else F.silu for path in row]
    return any(isinstance(a, nn.GroupNorm) and is_silu(b) for a, b in itertools.pairwise(found))


def norms_near(module: nn.Module) -> Iterator[tuple[str, ...]]:
    """The paths of GroupNorms among the children of ``module`` and theirs."""
    for name, child in module.named_children():
        if isinstance(child, nn.GroupNorm):
            yield (name,)
        yield from ((name, below) for below, each in child.named_children() if isinstance(each, nn.GroupNorm))


def resolved(module: Any, path: tuple[Any, ...]) -> Any:
    for name in path:
        module = module._modules.get(str(name)) if isinstance(module, nn.Module) else None
    return module


def definition_of(function: Any) -> ast.FunctionDef | None:
    """The definition that a function without decorators was compiled from, as the file still has it."""
    code = function.__code__
    try:
        tree = ast.parse("".join(inspect.findsource(function)[0]))
        whole = compile(tree, code.co_filename, "exec", dont_inherit=True)
    except (OSError, TypeError, SyntaxError):
        return None
    definitions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    here = [node for node in definitions if (node.name, node.lineno) == (code.co_name, code.co_firstlineno)]
    return here[0] if len(here) == 1 and code in codes(whole) and not has_private_names(here[0]) else None


def codes(code: types.CodeType) -> Iterator[types.CodeType]:
    for each in code.co_consts:
        if isinstance(each, types.CodeType):
            yield each
            yield from codes(each)


def has_private_names(definition: ast.FunctionDef) -> bool:
    """Whether it has names like `self.__norm`, which mean another thing outside of a class."""
    names = (getattr(node, "attr", getattr(node, "id", "")) for node in ast.walk(definition))
    return any(name.startswith("__") and not name.endswith("__") for name in names)


def compiled(definition: ast.FunctionDef, code: types.CodeType) -> types.CodeType:
    """The code of a definition that sees the names around it that ``code`` sees, and `RUN`."""
    around: Any = ast.parse(f"def around({', '.join((*code.co_freevars, RUN))}): pass")
    around.body[0].body = [definition]
    module = compile(
        ast.fix_missing_locations(around), code.co_filename, "exec", flags=code.co_flags & FUTURE, dont_inherit=True
    )
    here = code.co_name, code.co_firstlineno
    return next(each for each in codes(module) if (each.co_name, each.co_firstlineno) == here)
