"""The tool that types every how-to: what it would type, and that it leaves nothing running."""

import importlib.util
import os
import shlex
import socket
import sys
import time
from pathlib import Path

import pytest

from ppf import cli

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("walk_through", ROOT / "tools" / "walk_through.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def walk(tool, tmp_path, monkeypatch):
    """In a folder, with this environment's Python in its path."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    made = tool.Walk(tmp_path / "checkout", tmp_path / "work")
    made.work.mkdir()
    return made


def pages():
    return {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "howto").glob("*.md")}


def test_every_how_to_with_commands_is_walked(tool):
    assert set(tool.PAGES) == {name for name, page in pages().items() if "```console" in page}


def test_what_is_typed_are_commands(tool):
    lines = [line for name in tool.PAGES for line in tool.typed(pages()[name])]
    assert len(lines) > 30 and all(line.startswith(("ppf ", "pip ")) for line in lines)
    for line in lines:
        assert line.startswith("pip ") or cli._parse(shlex.split(line)[1:]) is not None


def test_nothing_is_replaced_or_left_out_that_no_page_has(tool):
    shown = "".join(pages()[name] for name in tool.PAGES)
    assert all(part in shown for part in tool.LEFT_OUT)
    for before in tool.INSTEAD:
        others = {name: after for name, after in tool.INSTEAD.items() if name != before}
        replaced = shown
        for name, after in others.items():
            replaced = replaced.replace(name, after)
        assert before in replaced, before


def test_a_command_and_what_it_printed_are_kept_without_places_of_this_machine(tool, walk):
    code = "import os; print('in', os.getcwd()); print('[1/9] measuring'); print('[1/9] measuring: done in 3 s')"
    walk.run(f"python -c {shlex.quote(code)}", walk.work)
    assert "\nin .\n[1/9] measuring: done in 3 s\n(0 s)\n" in walk.said[0] and str(walk.work) not in walk.said[0]
    (((command, seconds)),) = walk.seconds
    assert command.startswith("python -c") and 0 <= seconds < 60
    walk.keep("long", "\n".join(map(str, range(100))), 1)
    assert "\n19\n... 60 lines ...\n80\n" in walk.said[1]


def test_a_command_that_fails_ends_the_walk(walk):
    with pytest.raises(SystemExit, match="exit code 3"):
        walk.run("python -c 'raise SystemExit(3)'", walk.work)
    assert "raise SystemExit(3)" in walk.said[0], "what it printed is kept"


def test_a_command_that_takes_too_long_ends_with_its_children(tool, walk, monkeypatch):
    monkeypatch.setattr(tool, "PATIENCE", 2)
    with pytest.raises(SystemExit, match="not done after 2 s"):
        walk.run("sh -c 'sleep 99 & echo $! > child; wait'", walk.work)
    ends(int((walk.work / "child").read_text()))


def test_a_command_that_ends_leaves_no_child(walk):
    walk.run("sh -c 'sleep 99 > /dev/null 2>&1 & echo $! > child'", walk.work)
    ends(int((walk.work / "child").read_text()))


def ends(number):
    """Waits until a process is gone, or waits for its parent alone."""
    for _ in range(100):
        if not Path(f"/proc/{number}").exists() or "Z" in Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]:
            return
        time.sleep(0.1)
    raise AssertionError("the child runs on")


def test_what_an_earlier_command_wrote_makes_room(walk):
    (walk.work / "smaller").mkdir()
    (walk.work / "smaller.gguf").write_text("")
    walk.make_room("ppf prune s --ratio 0.3 --out smaller --gguf smaller.gguf")
    assert not list(walk.work.iterdir()) and len(walk.said) == 2


def test_a_server_takes_a_free_port_where_its_own_is_taken(tool):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert tool.with_free_port(f"ppf serve s --port {port} --nested") == "ppf serve s --nested --port 0"
    assert tool.with_free_port(f"ppf serve s --port {port}") == f"ppf serve s --port {port}"
