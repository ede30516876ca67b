"""Pages of the documentation that are made when it is built: from the code, and from the files beside the README.

    commands.md       what `ppf COMMAND --help` prints
    python.md         the public names, from their docstrings
    contributing.md   security.md   changelog.md     the files of the repository

docs_hook.py gives them to mkdocs.
"""

import contextlib
import io
import os
import re
from pathlib import Path

import ppf
from ppf import cli
from ppf.commands import COMMANDS

ROOT = Path(__file__).parents[1]
COPIED = {"contributing.md": "CONTRIBUTING.md", "security.md": "SECURITY.md", "changelog.md": "CHANGELOG.md"}
WIDTH = 110


def pages() -> dict[str, str]:
    """Markdown by the name of its page."""
    made = {"commands.md": commands_page(), "python.md": python_page()}
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
    """Every public name with its docstring."""
    head = "# Python\n\n`import ppf` is light: torch and transformers are loaded when a name that needs them is used.\n"
    note = "## Errors\n\nEvery error that ppf raises on purpose is one of these, in one line.\n"
    errors = [name for name in ppf._PUBLIC if name.endswith("Error")]
    others = [f"::: {module}.{name}\n" for name, module in ppf._PUBLIC.items() if name not in errors]
    raised = [f"::: {ppf._PUBLIC[name]}.{name}\n    options: {{heading_level: 3}}\n" for name in errors]
    return "\n".join([head, *others, note, *raised])


def copied(name: str) -> str:
    """A file of the repository, its links turned to the pages."""
    text = (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](")
    for page, source in COPIED.items():
        text = text.replace(f"]({source}", f"]({page}")
    return text
