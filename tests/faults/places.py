"""Places in the code at which something can be made to happen: before every statement of a module, and after the last
one of a block.

`install()` has to come before the modules are imported. Then every such place calls `on_place` with its name, which is
`trainer.py:120`, or `trainer.py:120+` after a block's last statement. Unlike with sys.settrace, what `on_place` raises
comes out of the place itself and the places after it go on calling.
"""

from __future__ import annotations

import ast
import importlib.machinery
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path

MODULES = (  # of aepo
    "trainer",
    "learning.learner",
    "learning.snapshot",
    "learning.nonfinite",
    "run.checkpoint",
    "run.checkpoints",
    "run.checkpoint_load",
    "run.continuity",
    "run.recording",
    "run.saving",
    "data",
    "heldout",
    "learning.optimizer",
    "parallel",
    "run.removal",
    "run.log",
    "run.directory",
    "run.refusals",
    "run.files",
    "run.lock",
    "run.boards",
    "files.tensors",
    "interrupt",
    "evaluation",
    "cli",
    "cli_shared",
)
HOOK = "__place__"
FUNCTIONS: dict[str, str] = {}  # of every place of the modules imported so far: trainer.py:Trainer.save


def _nowhere(place: str) -> None:
    pass


on_place: Callable[[str], None] = _nowhere


def install() -> None:
    sys.meta_path.insert(0, _Finder())


def _call(place: str) -> None:
    on_place(place)


class _Finder:
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        package, _, module = name.partition(".")
        if package != "aepo" or module not in MODULES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.origin is not None:
            spec.loader = _Loader(name, spec.origin)
        return spec


class _Loader(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname: str) -> types.CodeType:  # never from a .pyc, never into one
        path = self.get_filename(fullname)
        tree = _Instrument(Path(path).name).visit(ast.parse(self.get_data(path), path))
        return compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True)

    def exec_module(self, module: types.ModuleType) -> None:
        setattr(module, HOOK, _call)
        super().exec_module(module)


class _Instrument(ast.NodeTransformer):
    def __init__(self, file: str) -> None:
        self._file, self._names, self._in_function = file, [], False

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        return self._named(node, in_function=False)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        return self._named(node, in_function=True)

    def _named(self, node: ast.ClassDef | ast.FunctionDef, in_function: bool) -> ast.AST:
        outer, self._in_function = self._in_function, in_function
        self._names.append(node.name)
        node = self.generic_visit(node)
        self._names.pop()
        self._in_function = outer
        return node

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        if self._in_function:
            for field in ("body", "orelse", "finalbody"):
                block = getattr(node, field, None)
                if isinstance(block, list) and block and isinstance(block[0], ast.stmt):
                    setattr(node, field, self._with_places(block))
        return node

    def _with_places(self, block: list[ast.stmt]) -> list[ast.stmt]:
        result: list[ast.stmt] = []
        for statement in block:
            text = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
            if not text and not isinstance(statement, (ast.Global, ast.Nonlocal)):  # a docstring has to stay the first
                result.append(self._place(statement.lineno, ""))
            result.append(statement)
        if not isinstance(block[-1], (ast.Return, ast.Raise, ast.Continue, ast.Break)):
            result.append(self._place(block[-1].end_lineno or block[-1].lineno, "+"))
        return result

    def _place(self, line: int, after: str) -> ast.stmt:
        place = f"{self._file}:{line}{after}"
        FUNCTIONS[place] = f"{self._file}:{'.'.join(self._names)}"
        call = ast.Call(ast.Name(HOOK, ast.Load()), [ast.Constant(place)], [])
        statement = ast.Expr(call)
        for node in (statement, *ast.walk(call)):
            node.lineno = node.end_lineno = line  # type: ignore[attr-defined]
            node.col_offset = node.end_col_offset = 0  # type: ignore[attr-defined]
        return statement
