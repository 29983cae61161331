"""Mutation check: every small change of a module must make one of its own tests fail.

    python tools/mutants.py                              # the modules of MODULES
    python tools/mutants.py craft_optim/dual.py          # one of them
    python tools/mutants.py toy.py=test_toy.py,test_b.py # another, with its tests

A mutant is the module with one change: a comparison, an operator, a number, `min` for `max`, a condition, a returned
value, a statement less. Annotations, decorators, texts, `strict=` and the insides of a `raise` stay. Libraries are
imported once; each mutant is a fork that imports the package anew, with the changed module, and runs that module's
tests up to the first failure. A survivor that behaves as the original does is explained in `mutants.txt`.

Exits with 1 if fewer than 90 % of a module's mutants are killed, if a survivor is not explained, or if an explained one
does not survive.

Why not a library: mutmut 3 forks, too, but changes no field of a dataclass, no constant of a module, no property and
no `min`, and has no list of explained survivors; cosmic-ray starts a process per mutant, which imports torch each time.
"""

import argparse
import ast
import contextlib
import copy
import gc
import io
import os
import re
import resource
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.machinery import SourceFileLoader
from itertools import takewhile
from pathlib import Path
from types import CodeType
from typing import Any, NamedTuple

import pytest

MODULES = {
    "craft_optim/dual.py": ["tests/test_dual.py"],
    "craft_optim/schedules.py": ["tests/test_schedules.py"],
    "craft_optim/_step/scaling.py": ["tests/test_scaling.py"],
    "craft_optim/_step/cone.py": ["tests/constraints/test_cone.py"],
    "craft_optim/_step/decision.py": ["tests/constraints/test_decision.py"],
}
EXPLAINED = Path(__file__).with_suffix(".txt")
LEAST = 0.9
AT_ONCE = 2

# What else could have been written: names of ast's operators.
_SWAPS = (
    "Lt: LtE GtE, LtE: Lt Gt, Gt: GtE LtE, GtE: Gt Lt, Eq: NotEq, NotEq: Eq, Is: IsNot, IsNot: Is, In: NotIn, "
    "NotIn: In, Add: Sub, Sub: Add, Mult: Div, Div: Mult, Pow: Mult, BitAnd: BitOr, BitOr: BitAnd"
)
_OPERATORS = {
    getattr(ast, name): [getattr(ast, other) for other in others.split()]
    for name, others in (swap.split(": ") for swap in _SWAPS.split(", "))
}
_NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "minimum": "maximum", "maximum": "minimum"}
_LEFT_OUT = {"annotation", "returns", "decorator_list", "bases", "type_params"}
_TOKENS = re.compile(r"[\w.]*\de-\d+|[\w.]+|\s+|[\[\](){},]|[^\w\s.\[\](){},]+")


class Place(NamedTuple):
    """A node of a tree, and what it takes to put another there.

    Attributes:
        node: What stands there.
        put: Puts another node there.
        function: Name of the function or class around it.
        field: Name of the place in its parent.
        assigned: Line in which each name of that function is first given a value.
    """

    node: ast.AST
    put: Callable[[ast.AST], None]
    function: str
    field: str
    assigned: Mapping[str, int]


def places(node: ast.AST, function: str = "module", assigned: Mapping[str, int] | None = None) -> Iterator[Place]:
    """All places below a node that may change, from the first line to the last."""
    for field, value in ast.iter_fields(node):
        children = value if isinstance(value, list) else [value]
        for i, child in enumerate(children):
            if field in _LEFT_OUT or not isinstance(child, ast.AST) or getattr(child, "arg", None) == "strict":
                continue
            put = partial(children.__setitem__, i) if children is value else partial(setattr, node, field)
            where, names = function, assigned or {}
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                where = child.name if function == "module" else f"{function}.{child.name}"
                inside = sorted(ast.walk(child), key=lambda n: -getattr(n, "lineno", 0))
                names = {n.id: n.lineno for n in inside if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
                names |= {n.arg: n.lineno for n in inside if isinstance(n, ast.arg)}
            yield Place(child, put, where, field, names)
            if not isinstance(child, ast.Raise | ast.JoinedStr | ast.Import | ast.ImportFrom):
                yield from places(child, where, names)


def _with(node: ast.AST, **fields: object) -> ast.AST:
    changed = copy.copy(node)
    vars(changed).update(fields)
    return changed


def changes(place: Place) -> Iterator[ast.AST]:
    """What else could stand in a place."""
    match node := place.node:
        case ast.Compare(ops=ops):
            for i, op in enumerate(ops):
                yield from (_with(node, ops=[*ops[:i], other(), *ops[i + 1 :]]) for other in _OPERATORS[type(op)])
        case ast.BinOp(op=op) | ast.AugAssign(op=op):
            yield from (_with(node, op=other()) for other in _OPERATORS.get(type(op), []))
        case ast.UnaryOp(op=ast.USub() | ast.Not(), operand=operand):
            yield operand
        case ast.BoolOp(op=op, values=values):
            yield _with(node, op=ast.Or() if isinstance(op, ast.And) else ast.And())
            for i in range(len(values)):
                first, *others = values[:i] + values[i + 1 :]
                yield _with(node, values=[first, *others]) if others else first
        case ast.IfExp(body=body, orelse=orelse):
            yield from (body, orelse)
        case ast.Constant(value=bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(value=int(value)):
            yield ast.Constant(value + 1)
        case ast.Constant(value=float(value)):
            yield ast.Constant(2.0 * value or 1.0)
        case ast.Attribute(attr="inf"):
            yield ast.Constant(0.0)
        case ast.Call(func=ast.Name(id=name) as function) if name in _NAMES:
            yield _with(node, func=_with(function, id=_NAMES[name]))
        case ast.Call(func=ast.Attribute(attr=name) as function) if name in _NAMES:
            yield _with(node, func=_with(function, attr=_NAMES[name]))
        case ast.Call(func=ast.Name(id="abs") | ast.Attribute(attr="abs"), args=[argument]):
            yield argument
        case ast.Return(value=ast.expr()):
            yield _with(node, value=ast.Constant(None))
        case ast.Raise() | ast.Continue() | ast.Break() | ast.Expr(value=ast.Call()):
            yield ast.Pass()
    match node:
        # Without its first value a name is an error at once, which shows nothing.
        case ast.Assign(targets=[ast.Name(id=name)]) if place.assigned.get(name, node.lineno) < node.lineno:
            yield ast.Pass()
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]) | ast.AugAssign():
            yield ast.Pass()
        case ast.Name() | ast.Call() | ast.Attribute() if place.field in {"test", "ifs"}:
            yield ast.UnaryOp(ast.Not(), node)


@dataclass(frozen=True)
class Mutant:
    """A changed module. `key` is what makes it known again: module, function, and the line with {before -> after}."""

    key: str
    line: int
    code: CodeType


def mutants_of(file: str) -> Iterator[Mutant]:
    """All mutants of a module."""
    tree = ast.parse(Path(file).read_text("utf-8"))
    original = ast.unparse(tree).splitlines()
    for place in places(tree):
        for other in changes(place):
            place.put(ast.copy_location(other, place.node))
            changed = ast.unparse(tree).splitlines()
            code = compile(ast.fix_missing_locations(copy.deepcopy(tree)), file, "exec")
            place.put(place.node)
            (lines,) = (pair for pair in zip(original, changed, strict=True) if len(set(pair)) > 1)
            yield Mutant(f"{file} {place.function}: {_difference(*lines)}", getattr(place.node, "lineno", 0), code)


def _difference(before: str, after: str) -> str:
    old, new = _TOKENS.findall(before.strip()), _TOKENS.findall(after.strip())
    start = _alike(old, new)
    end = _alike(old[start:][::-1], new[start:][::-1])
    parts = old[:start], old[start : len(old) - end], new[start : len(new) - end], old[len(old) - end :]
    return "{}{{{} -> {}}}{}".format(*map("".join, parts))


def _alike(old: Sequence[str], new: Sequence[str]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(old, new, strict=False)))


def forked(file: str, tests: Sequence[str], code: CodeType | None, seconds: int) -> int:
    """Starts a process that runs the tests on the changed module, or on the module as it is.

    Args:
        file: The module.
        tests: Its test files.
        code: The changed module, or None.
        seconds: Processor time after which the process is ended.

    Returns:
        Its id. Its exit status is 0 if all tests pass.
    """
    if child := os.fork():
        return child
    status = 1
    try:
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        name, get_code = file.removesuffix(".py").replace("/", "."), SourceFileLoader.get_code

        def changed(loader: Any, fullname: str) -> CodeType | None:
            return code if code and fullname == name else get_code(loader, fullname)

        SourceFileLoader.get_code = changed  # type: ignore[method-assign,assignment]
        status = int(pytest.main([*tests, "-x", "-q", "-p", "no:cacheprovider"]))
    finally:
        os._exit(status)


def survivors(file: str, tests: Sequence[str], mutants: Sequence[Mutant]) -> Iterator[Mutant]:
    """Mutants that no test notices.

    Raises:
        SystemExit: If the tests fail on the module as it is.
    """
    _, status, used = os.wait4(forked(file, tests, None, 600), 0)
    if status != 0:
        raise SystemExit(f"{file}: its tests must pass before it is changed. Run `pytest {' '.join(tests)}` first.")
    seconds = 5 + 3 * round(used.ru_utime + used.ru_stime)
    running: dict[int, Mutant] = {}
    for mutant in [*mutants, *[None] * AT_ONCE]:
        if len(running) == AT_ONCE or (running and mutant is None):
            child, status = os.wait()
            tried = running.pop(child)
            if status == 0:
                yield tried
        if mutant is not None:
            running[forked(file, tests, mutant.code, seconds)] = mutant


def import_libraries(tests: Sequence[str]) -> None:
    """Imports what the tests import, and forgets again what belongs to this folder.

    Raises:
        SystemExit: If they cannot be imported.
    """
    with contextlib.redirect_stdout(io.StringIO()) as said:
        status = pytest.main([*tests, "--collect-only", "-q", "-p", "no:cacheprovider"])
    if status != 0:
        raise SystemExit(f"pytest finds no tests in {' '.join(tests)}.\n{said.getvalue()}")
    for name, module in list(sys.modules.items()):
        file = Path(getattr(module, "__file__", None) or "/")
        if file.is_relative_to(Path.cwd()) and "site-packages" not in file.parts and name != "__main__":
            del sys.modules[name]
    gc.freeze()  # pytest collects garbage several times in each fork; what is here by now need not be looked through


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints how many mutants of each module the tests kill, and which survive. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", default=list(MODULES), help="a module of MODULES, or module=tests")
    parser.add_argument("--explained", type=Path, default=EXPLAINED, help="survivors and their reasons")
    options = parser.parse_args(arguments)
    wanted = {}
    for file, _, tests in (module.partition("=") for module in options.modules):
        if not tests and file not in MODULES:
            parser.error(f"{file} is not in MODULES: name its tests, {file}=tests/test_this.py.")
        wanted[file] = tests.split(",") if tests else MODULES[file]
    lines = [line for line in options.explained.read_text("utf-8").splitlines() if line and not line.startswith("#")]
    reasons = dict(line.rsplit("  # ", 1) for line in lines)
    stale = {key for key in reasons if (file := key.split()[0]) in wanted or file not in MODULES}
    sys.path.insert(0, str(Path.cwd()))
    import_libraries([test for tests in wanted.values() for test in tests])
    failed = False
    for file, tests in wanted.items():
        mutants = list(mutants_of(file))
        alive = sorted(survivors(file, tests, mutants), key=lambda mutant: mutant.line)
        share = 1.0 - len(alive) / len(mutants)
        print(f"{file}: {len(mutants)} mutants, {share:.1%} killed, {len(alive)} survive", flush=True)
        for mutant in alive:
            print(f"  {mutant.line}: {mutant.key}  # {reasons.get(mutant.key, 'NOT EXPLAINED')}", flush=True)
        stale -= {mutant.key for mutant in alive}
        failed |= share < LEAST or any(mutant.key not in reasons for mutant in alive)
    for key in sorted(stale):
        print(f"{options.explained}: does not survive, take the line out: {key}")
    return int(failed or bool(stale))


if __name__ == "__main__":
    sys.exit(main())
