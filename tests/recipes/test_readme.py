import functools
import re
import shlex
from pathlib import Path

import pytest

import ppf
import tiny_models
from fit_runs import SETTINGS
from ppf import cli

README = Path(__file__).parents[2] / "README.md"


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def test_the_example_in_python_runs(place, tmp_path, monkeypatch, capsys):
    """On a tiny model and a small text, in place of the embedded ones."""
    (code,) = blocks("python")
    monkeypatch.chdir(tmp_path)
    tiny_models.save(tmp_path / "ref-a")
    monkeypatch.setattr(ppf, "fit", functools.partial(ppf.fit, quiet=True, workers=1, **SETTINGS), raising=False)
    code = code.replace('"ref-a"', f'"{tmp_path / "ref-a"}"').replace('"pydocs"', f'"{place / "text.txt"}"')
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "smaller" / "ppf.json").is_file() and "[" in capsys.readouterr().out


@pytest.mark.parametrize("line", [line for block in blocks("console") for line in block.splitlines() if line.startswith("ppf ")])
def test_every_command_shown_is_one(line):
    assert cli._parse(shlex.split(line, comments=True)[1:]) is not None


def test_the_make_targets_shown_exist():
    makefile = (README.parent / "Makefile").read_text()
    targets = re.findall(r"^make (\w+)", "\n".join(blocks("console")), re.MULTILINE)
    assert targets and all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def test_what_the_readme_links_to_is_there():
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", README.read_text()):
        assert (README.parent / link).exists(), link
