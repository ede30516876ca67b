"""What the documentation shows is what there is."""

import ast
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import ppf
from ppf import cli
from ppf.commands import COMMANDS
from ppf.config import Target
from test_package import FLOORS

ROOT = Path(__file__).parents[1]
SOURCE = Path(ppf.__file__).parent
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), *(ROOT / f"{name}.md" for name in ("CONTRIBUTING", "SECURITY", "CHANGELOG"))]
MADE = runpy.run_path(str(ROOT / "tools" / "docs_pages.py"))
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


SHOWN = [line for page in PAGES for block in blocks(page, "console") for line in block.splitlines()]


@pytest.mark.parametrize("line", sorted({line for line in SHOWN if line.startswith("ppf ")}))
def test_every_command_shown_is_one(line):
    assert cli._parse(shlex.split(line, comments=True)[1:]) is not None


def test_other_commands_shown_are_there():
    makefile, project = ((ROOT / name).read_text() for name in ("Makefile", "pyproject.toml"))
    for line in SHOWN:
        if line.startswith("make "):
            assert re.search(rf"^{line.split()[1]}:", makefile, re.MULTILINE), line
        elif line.startswith("pip "):
            (extra,) = re.findall(r"'ppf\[(\w+)\]'", line)
            assert re.search(rf"^{extra} = \[", project, re.MULTILINE), line
        else:
            assert line.startswith("ppf "), line


def stripped(code):
    return [line.strip() for line in code.splitlines() if line.strip()]


@pytest.mark.parametrize("page", [ROOT / "docs" / "index.md", *(ROOT / "docs" / "howto").glob("*.md")], ids=lambda page: page.stem)
def test_code_shown_is_code_of_an_example(page):
    """So that it is run: tests/test_examples.py runs them all."""
    examples = [stripped(path.read_text(encoding="utf-8")) for path in (ROOT / "examples").glob("*.py")]
    for block in blocks(page, "python"):
        shown = stripped(block)
        found = any(example[start : start + len(shown)] == shown for example in examples for start in range(len(example)))
        assert found, block


@each_page
def test_links_and_named_files_are_there(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text):
        assert (page.parent / link).exists() or page.with_name(link).name in MADE["COPIED"], link
    for name in re.findall(r"`((?:examples|tools|tests|benchmarks)/[\w./-]+\.\w+)`", text):
        assert (ROOT / name).is_file(), name
    if page.name in ("concepts.md", "paper.md"):  # files of the source, with what is in them
        for name, inside in re.findall(r"`((?:space|llm|learn|recipes|config)/\w+\.py|\w+\.py)(?:: (\w+))?`", text):
            assert (SOURCE / name).is_file() and inside in (SOURCE / name).read_text(encoding="utf-8"), (name, inside)


def test_the_picture_of_the_house_has_every_part_on_its_floor():
    picture = blocks(ROOT / "docs" / "concepts.md", "text")[-1].splitlines()
    rows = [re.match(r"(.*?)\s+(\d) ", line).groups() for line in picture]
    shown = {name: int(floor) for names, floor in rows for name in re.findall(r"(\w+)(?:/|\.py)", names)}
    assert shown == {name: floor for name, floor in FLOORS.items() if not name.startswith("_")}


def test_every_example_is_told_of():
    told = "".join(page.read_text(encoding="utf-8") for page in [*PAGES, *(ROOT / "examples").glob("*.md")])
    assert all(path.name in told for path in (ROOT / "examples").iterdir() if path.suffix in (".py", ".ipynb"))


def test_the_glossary_has_every_public_type():
    glossary = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    files = [*(SOURCE / "space").glob("*.py"), *(SOURCE / "learn").glob("*.py"), SOURCE / "samples.py", SOURCE / "decide.py"]
    types = {node.name for path in files for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)}
    types |= {name for name in ppf.__all__ if isinstance(getattr(ppf, name), type)}
    wanted = {name for name in types if not name.startswith("_") and not name.endswith("Config")} - {"Facts"}
    assert not {name for name in wanted if not re.search(rf"`(\w+\.)*{name}`", glossary)}


def test_the_glossary_has_every_letter():
    head = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8").partition("|")[0]
    code = "".join(path.read_text(encoding="utf-8") for folder in ("space", "learn") for path in (SOURCE / folder).glob("*.py"))
    used = set(re.findall(r"\b[A-Zn]\b", " ".join(re.findall(r"(?:Int|Float|Bool)\[([^]]*)\]", code))))
    assert not used - set(re.findall(r"\*\*(\w)(?: \+ 1)?\*\*", head)) - {"H", "W"}, "H and W are a picture's, as everywhere"


def test_the_page_of_commands_is_made_of_the_code():
    page = MADE["commands_page"]()
    assert re.findall(r"^## ppf (\w+)$", page, re.MULTILINE) == list(COMMANDS)
    for name, (config, _) in COMMANDS.items():
        section = page.partition(f"## ppf {name}\n")[2].partition("\n## ")[0]
        own = [field.name for field in fields(config) if field.name != "target"]
        wanted = own if len(own) == len(fields(config)) else [*own, *(field.name for field in fields(Target))]
        missing = [flag for flag in wanted if f"--{flag.replace('_', '-')} " not in f"{section} "]
        assert missing in ([], ["model"], ["study"], ["studies"]), f"ppf {name}: {missing}"  # positional


def test_the_page_of_python_names_all_and_lists_their_first_lines():
    page = MADE["python_page"]()
    for name in ppf.__all__[1:]:
        assert re.search(rf"^::: ppf\.[\w.]+\.{name}$", page, re.MULTILINE)
        assert f"[`{name}`](#ppf." in page and getattr(ppf, name).__doc__.splitlines()[0].replace("``", "`") in page


def test_the_page_of_the_source_has_every_file_and_every_public_name():
    page = MADE["source_page"]()
    assert "None" not in re.findall(r"(?m): (\w+)$", page)
    for path in SOURCE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert path.name == "__init__.py" or f"- **{path.name}**: {ast.get_docstring(tree).split()[0]}" in page.replace("&lt;", "<")
        names = [node.name for node in tree.body if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node)]
        assert all(f"- `{name}`: " in page for name in names if name[0] != "_"), path


def test_every_page_is_in_the_contents():
    contents = (ROOT / "mkdocs.yml").read_text()
    names = {page.relative_to(ROOT / "docs").as_posix() for page in PAGES if ROOT / "docs" in page.parents} | set(MADE["pages"]())
    assert {name for name in names if f": {name}\n" not in contents} == set()


def test_the_page_on_the_paper_holds_no_figure():
    """Figures change with every benchmark; it links to them."""
    page = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8").replace("2508.02381", "")
    assert not re.findall(r"\d\.\d|\d ?%", page)


def test_the_version_is_the_same_everywhere():
    assert f"\nversion: {ppf.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    newest = re.split(r"^## ", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)[1]
    assert newest.startswith(ppf.__version__) and "### Results" in newest


def test_nothing_is_fetched_from_elsewhere():
    """No web fonts; and no mermaid, whose code the theme would fetch."""
    assert "font: false" in (ROOT / "mkdocs.yml").read_text()
    assert not any("```mermaid" in page.read_text(encoding="utf-8") for page in PAGES)


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs", reason="needs ppf[docs]")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    result = subprocess.run(command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True)
    assert result.returncode == 0 and not (result.stdout + result.stderr).strip(), result.stdout + result.stderr
    elsewhere = re.compile(r'<(?:script|link|img|iframe)[^>]*(?:src|href)="(?:https?:)?//')
    found = {page.name for page in (tmp_path / "site").rglob("*.html") if elsewhere.search(page.read_text(encoding="utf-8"))}
    assert not found
    assert json.loads((tmp_path / "site" / "search" / "search_index.json").read_text())["docs"]
