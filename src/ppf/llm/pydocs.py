"""The `pydocs` corpus: English documentation that lies on every Python installation.

Documents are the help topics of CPython and, per public module of the standard library, its docstrings of 80 characters
or more. A hash of a document's name puts it into one of ten buckets: 0 is calibration, 1 search, 2 test; the embedded
reference model was trained on 3 to 9.
"""

import ast
import hashlib
import os
import pydoc_data.topics
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

_SHORTEST = 80
_LEFT_OUT = {"test", "idlelib", "lib2to3"}
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def documents(bucket: int) -> list[str]:
    """The documents of one bucket, sorted by kind and name."""
    return list(_texts(bucket))


def first_document(bucket: int) -> str:
    """One of them, without reading the others."""
    return next(_texts(bucket))


def bucket_of(name: str) -> int:
    """Bucket 0 to 9 of a document's name, by SHA-256."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10


def _texts(bucket: int) -> Iterator[str]:
    for name, text in pydoc_data.topics.topics.items():
        if bucket_of(f"topic:{name}") == bucket:
            yield text
    library = Path(os.__file__).parent
    for name in sorted(sys.stdlib_module_names):
        if not name.startswith("_") and name not in _LEFT_OUT and bucket_of(f"module:{name}") == bucket:
            docstrings = [text for file in _sources(library, name) for text in _docstrings(file)]
            if docstrings:
                yield "\n\n".join(docstrings)


def _sources(library: Path, name: str) -> list[Path]:
    single = library / f"{name}.py"
    if single.exists():
        return [single]
    found = []
    for folder, subfolders, files in os.walk(library / name):
        subfolders[:] = sorted(entry for entry in subfolders if entry not in ("test", "tests", "__pycache__"))
        found += [Path(folder) / file for file in sorted(files) if file.endswith(".py")]
    return found


def _docstrings(file: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return
    for node in ast.walk(tree):
        if isinstance(node, _DOCUMENTED):
            docstring = ast.get_docstring(node)
            if docstring and len(docstring) >= _SHORTEST:
                yield docstring
