"""Pages of the documentation that are made when it is built: from the code, and from the files beside the README.

    commands.md       what `ppf COMMAND --help` prints
    python.md         the public names, from their docstrings
    source.md         every file of the source and what is in it, in a line each
    contributing.md   security.md   changelog.md     the files of the repository

docs_hook.py gives them to mkdocs.
"""

import ast
import contextlib
import io
import os
import re
from pathlib import Path

import ppf
from ppf import cli
from ppf.commands import COMMANDS

ROOT = Path(__file__).parents[1]
SOURCE = Path(ppf.__file__).parent
COPIED = {"contributing.md": "CONTRIBUTING.md", "security.md": "SECURITY.md", "changelog.md": "CHANGELOG.md"}
WIDTH = 110


def pages() -> dict[str, str]:
    """Markdown by the name of its page."""
    made = {"commands.md": commands_page(), "python.md": python_page(), "source.md": source_page()}
    return made | {name: copied(source) for name, source in COPIED.items()}


def commands_page() -> str:
    """What every command prints of itself."""
    parts = ["# Commands\n\nMade from the code: each section is what `--help` prints. A default stands in brackets.\n"]
    for name in COMMANDS:
        parts.append(f"## ppf {name}\n\n```text\n{help_of(name)}\n```\n")
    codes = re.sub(r"\s+", " ", str(cli.__doc__).split("\n\n")[1])
    return "\n".join([*parts, f"## Exit codes\n\n{codes.removeprefix('Exit codes: ').strip()}\n"])


def help_of(command: str) -> str:
    """What `ppf COMMAND --help` prints."""
    os.environ["COLUMNS"] = str(WIDTH)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        cli._parse([command, "--help"])
    return re.sub(r"(?m)^ (\w[\w ]*)\n -+$", r"\1:", printed.getvalue()).strip()


def python_page() -> str:
    """Every public name, in a list with the first line of its docstring, and then with all of it."""
    head = "# Python\n\n`import ppf` is light: torch and transformers are loaded when a name that needs them is used.\n"
    rows = [f"| [`{name}`](#{module}.{name}) | {first_line(getattr(ppf, name).__doc__)} |" for name, module in ppf._PUBLIC.items()]
    listed = "\n".join(["| name | what it is |", "|---|---|", *rows, ""])
    note = "## Errors\n\nEvery error that ppf raises on purpose is one of these, in one line.\n"
    errors = [name for name in ppf._PUBLIC if name.endswith("Error")]
    others = [f"::: {module}.{name}\n" for name, module in ppf._PUBLIC.items() if name not in errors]
    raised = [f"::: {ppf._PUBLIC[name]}.{name}\n    options: {{heading_level: 3}}\n" for name in errors]
    return "\n".join([head, listed, *others, note, *raised])


def source_page() -> str:
    """Every file of the source with what it says of itself, and its public classes and functions."""
    words = "Made from the code: the first line of each docstring. [Concepts](concepts.md) has the floors."
    parts, folder = [f"# The source, file by file\n\n{words}\n"], None
    for path in sorted(SOURCE.rglob("*.py"), key=lambda path: (path.parent, path.name)):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if path.parent != folder:
            folder = path.parent
            parts.append(f"## {folder.relative_to(SOURCE.parent).as_posix()}/\n\n{first_line(ast.get_docstring(tree))}\n")
        named = [node for node in tree.body if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))]
        shown = [(node.name, ast.get_docstring(node)) for node in named if node.name[0] != "_"]
        rows = [f"    - `{name}`: {first_line(said)}" for name, said in shown if said]
        if rows or path.name != "__init__.py":
            parts.append("\n".join([f"- **{path.name}**: {first_line(ast.get_docstring(tree))}", *rows, ""]))
    return "\n".join(parts)


def first_line(docstring: str | None) -> str:
    """Of a docstring, safe in a table."""
    return str(docstring).strip().splitlines()[0].replace("``", "`").replace("|", "\\|").replace("<", "&lt;")


def copied(name: str) -> str:
    """A file of the repository, its links turned to the pages."""
    text = (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](")
    for page, source in COPIED.items():
        text = text.replace(f"]({source}", f"]({page}")
    return text
