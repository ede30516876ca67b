"""Every public name says what it is and what it takes."""

import ast
from pathlib import Path

import pytest

import ppf

SOURCE = Path(ppf.__file__).parent
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
UNDOCUMENTED = {"llm/pruned_model.py"}
"""Copied into exported folders: each class is its family's own, and is named after it."""


def public(path):
    """Public classes and functions of a file, and methods; not those of a class with bases, whose names are documented there."""
    todo = [("", node) for node in ast.parse(path.read_text(encoding="utf-8")).body]
    while todo:
        prefix, node = todo.pop(0)
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)) and not node.name.startswith("_"):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef) and not node.bases:
                todo += [(f"{node.name}.", child) for child in node.body]


def bare(node):
    """Arguments of a function that have no annotation, and its result."""
    given = node.args
    arguments = [*given.posonlyargs, *given.args, *given.kwonlyargs, *filter(None, (given.vararg, given.kwarg))]
    names = [argument.arg for argument in arguments if argument.annotation is None and argument.arg not in ("self", "cls")]
    return names if node.returns is not None else [*names, "return"]


FILES = sorted(path for path in SOURCE.rglob("*.py") if path.relative_to(SOURCE).as_posix() not in UNDOCUMENTED)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_public_names_are_documented_and_annotated(path):
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), "the module"
    for name, node in public(path):
        assert ast.get_docstring(node), name
        assert isinstance(node, ast.ClassDef) or not bare(node), f"{name}: {bare(node)}"


def test_the_first_line_of_a_docstring_is_one_sentence():
    for name in ppf.__all__[1:]:
        first = getattr(ppf, name).__doc__.splitlines()[0]
        assert first.endswith(".") and len(first) <= 132, name


def test_the_package_is_typed():
    assert (SOURCE / "py.typed").is_file()
