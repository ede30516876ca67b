import importlib.util
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import ppf
from ppf import provenance as module
from ppf.provenance import machine, own_name, portable, provenance

HERE = Path(module.__file__).parent
needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="no git here")


def git(folder, *arguments):
    """What git says, with nobody's settings."""
    settings = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    names = {f"GIT_{who}_{what}": "a@b.c" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    result = subprocess.run(
        ["git", *arguments], cwd=folder, capture_output=True, text=True, env={**os.environ, **settings, **names}
    )
    return result.stdout.strip()


def copied(folder):
    """The module in another place."""
    folder.mkdir(parents=True, exist_ok=True)
    path = Path(shutil.copy(module.__file__, folder))
    spec = importlib.util.spec_from_file_location("provenance_elsewhere", path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.fixture
def checkout(tmp_path):
    """A checkout of a project that has the module, and some files beside it."""
    found = copied(tmp_path / "src" / "ppf")
    for name in ("src/ppf/other.py", "benchmarks/run.py", "benchmarks/results/a.json", "docs/results.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1\n")
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--message", "a")
    return tmp_path, found


# --- the command ---


@pytest.mark.parametrize(
    ("program", "arguments", "command"),
    [
        ("/usr/local/bin/ppf", ["bench", "runs/a", "--ratios", "0.2"], "ppf bench runs/a --ratios 0.2"),
        ("/home/someone/ppf/src/ppf/__main__.py", ["fit", "/home/someone/model"], "python -m ppf fit model"),
        ("benchmarks/agents.py", ["--out", "/home/someone/a.json"], "python benchmarks/agents.py --out a.json"),
        ("/home/someone/benchmarks/agents.py", ["--out=/home/someone/a.json"], "python benchmarks/agents.py --out=a.json"),
        ("ppf", ["fit", "ref-a", "--text=a=b.txt"], "ppf fit ref-a --text=a=b.txt"),
    ],
)
def test_the_command_says_what_ran_and_names_no_folder_of_the_machine(monkeypatch, program, arguments, command):
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    assert provenance()["command"] == command


def test_version_and_machine_are_those_that_run(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    found = provenance()
    assert found["version"] == ppf.__version__ and found["machine"]["threads"] == "3"
    assert found["machine"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["machine"]["torch"] == version("torch") and found["machine"]["cores"] >= 1
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert machine()["threads"] == "default"


# --- the commit ---


@needs_git
def test_the_commit_is_that_of_this_checkout():
    found = provenance()["commit"]
    if git(HERE, "ls-files", module.__file__):
        assert found.removesuffix("-dirty") == git(HERE, "rev-parse", "HEAD")
    else:
        assert found is None


@needs_git
def test_the_commit_of_a_clean_checkout_is_its_head_wherever_one_stands(checkout, tmp_path_factory, monkeypatch):
    folder, found = checkout
    head = git(folder, "rev-parse", "HEAD")
    assert len(head) == 40
    for place in (folder, folder / "src", tmp_path_factory.mktemp("elsewhere")):
        monkeypatch.chdir(place)
        assert found.provenance()["commit"] == head


@needs_git
@pytest.mark.parametrize(
    ("name", "dirty"),
    [
        ("src/ppf/other.py", True),
        ("benchmarks/run.py", True),
        ("benchmarks/results/a.json", False),
        ("docs/results.md", False),
        ("new.py", False),
    ],
)
def test_a_changed_file_that_could_change_a_figure_makes_it_dirty(checkout, name, dirty):
    folder, found = checkout
    head = git(folder, "rev-parse", "HEAD")
    (folder / name).write_text("2\n")
    assert found.provenance()["commit"] == head + ("-dirty" if dirty else "")


def test_outside_a_checkout_there_is_none(tmp_path):
    assert copied(tmp_path / "ppf").provenance()["commit"] is None


@needs_git
def test_a_package_installed_inside_a_strange_checkout_has_not_its_commit(tmp_path):
    git(tmp_path, "init")
    git(tmp_path, "commit", "--allow-empty", "--message", "a")
    assert len(git(tmp_path, "rev-parse", "HEAD")) == 40
    assert copied(tmp_path / "venv" / "ppf").provenance()["commit"] is None


@needs_git
def test_without_git_there_is_none(checkout, monkeypatch, tmp_path_factory):
    _, found = checkout
    monkeypatch.setenv("PATH", str(tmp_path_factory.mktemp("empty")))
    assert found.provenance()["commit"] is None


@pytest.mark.parametrize(
    ("name", "told"),
    [("ref-a", "ref-a"), ("org/model", "org/model"), ("/a/b/model", "model"), ("./b/model", "model"), ("~/m", "m"), ("a/b/c", "c")],
)
def test_names_without_folders(name, told):
    assert own_name(name) == told


def test_a_path_that_is_there_is_named_by_its_last_part(tmp_path, monkeypatch):
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "a.txt").touch()
    monkeypatch.chdir(tmp_path)
    assert own_name("books/a.txt") == "a.txt" and own_name("books/b.txt") == "books/b.txt"


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        ("/a/b/m0", "m0"),
        ("--study=/a/b/m0", "--study=m0"),
        ("runs/m0", "runs/m0"),
        ("--ratio=0.3", "--ratio=0.3"),
        ("x=/a", "x=/a"),
    ],
)
def test_arguments_that_may_be_passed_on(argument, told):
    assert portable(argument) == told
