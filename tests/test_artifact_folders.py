import errno
import os

import pytest

from builders import full_disk, interrupted, names_in, refuses
from ppf import artifact
from ppf.artifact import atomic_folder, check_new_folder
from ppf.errors import DamagedError, InputError, ResourceError


def fill(folder, text="new"):
    (folder / "inner").mkdir()
    (folder / "inner" / "a.txt").write_text(text)


def earlier(folder):
    """What force may replace."""
    folder.mkdir()
    fill(folder, "old")
    (folder / "ppf.json").touch()


def denied(*_):
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def test_a_folder_appears_whole_at_the_end(tmp_path):
    target = tmp_path / "not" / "yet" / "there"
    with atomic_folder(target) as folder:
        fill(folder)
        assert not target.exists() and folder.parent == target.parent
    assert (target / "inner" / "a.txt").read_text() == "new"
    assert names_in(target.parent) == ["there"]


@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt(), DamagedError("a; b; c"), OSError("no number")])
@pytest.mark.parametrize("force", [False, True])
def test_nothing_changes_when_the_block_fails(tmp_path, error, force):
    if force:
        earlier(tmp_path / "out")
    with pytest.raises(type(error)) as caught, atomic_folder(tmp_path / "out", force) as folder:
        fill(folder)
        raise error
    assert caught.value is error
    assert names_in(tmp_path) == (["out"] if force else [])
    assert not force or (tmp_path / "out" / "inner" / "a.txt").read_text() == "old"


@pytest.mark.parametrize("force", [False, True])
def test_nothing_changes_when_the_disk_is_full(tmp_path, monkeypatch, force):
    if force:
        earlier(tmp_path / "out")
    with refuses(ResourceError), atomic_folder(tmp_path / "out", force) as folder:
        fill(folder)
        monkeypatch.setattr(os, "fsync", full_disk)
    assert names_in(tmp_path) == (["out"] if force else [])
    assert not force or (tmp_path / "out" / "inner" / "a.txt").read_text() == "old"


def failing_renames(monkeypatch, failure, *which):
    """Makes these calls of os.rename fail on a disk that cannot exchange folders; returns the list of calls."""
    monkeypatch.setattr(artifact, "_exchange", lambda *_: False)
    rename, calls = os.rename, []

    def counted(source, target):
        calls.append(source)
        return failure() if len(calls) in which else rename(source, target)

    monkeypatch.setattr(os, "rename", counted)
    return calls


@pytest.mark.parametrize("failing", [1, 2])
def test_the_old_folder_comes_back_when_the_last_step_fails(tmp_path, monkeypatch, failing):
    earlier(tmp_path / "out")
    calls = failing_renames(monkeypatch, full_disk, failing)
    with refuses(ResourceError), atomic_folder(tmp_path / "out", force=True) as folder:
        fill(folder)
    assert len(calls) == failing + 1
    assert names_in(tmp_path) == ["out"] and (tmp_path / "out" / "inner" / "a.txt").read_text() == "old"


def test_the_old_folder_comes_back_when_the_last_step_is_interrupted(tmp_path, monkeypatch):
    earlier(tmp_path / "out")
    failing_renames(monkeypatch, interrupted, 2)
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "out", force=True) as folder:
        fill(folder)
    assert names_in(tmp_path) == ["out"] and (tmp_path / "out" / "inner" / "a.txt").read_text() == "old"


def test_the_old_folder_is_never_lost(tmp_path, monkeypatch):
    earlier(tmp_path / "out")
    failing_renames(monkeypatch, full_disk, 2, 3)
    with refuses(ResourceError), atomic_folder(tmp_path / "out", force=True) as folder:
        fill(folder)
    assert [path.read_text() for path in tmp_path.rglob("a.txt")] == ["old"]


def test_force_replaces_a_folder_and_all_in_it(tmp_path):
    earlier(tmp_path / "out")
    (tmp_path / "out" / "stale").touch()
    with refuses(InputError), atomic_folder(tmp_path / "out"):
        pytest.fail("the block must not start")
    with atomic_folder(tmp_path / "out", force=True) as folder:
        fill(folder)
        assert (tmp_path / "out" / "stale").exists()
    assert names_in(tmp_path) == ["out"] and names_in(tmp_path / "out") == ["inner"]


@pytest.mark.parametrize("marker", ["ppf.json", "other"])
def test_force_replaces_nothing_that_no_earlier_call_wrote(tmp_path, marker):
    for path in ("out/study.json", "out/inner/ppf.json", "out/inner/other"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("keep")
    for place in (tmp_path / "out", tmp_path):
        with refuses(InputError) as caught, atomic_folder(place, force=True, marker=marker):
            pytest.fail("the block must not start")
        assert marker in str(caught.value)
        with refuses(InputError):
            check_new_folder(place, True, marker)
    assert sum(path.read_text() == "keep" for path in tmp_path.rglob("*") if path.is_file()) == 3
    with atomic_folder(tmp_path / "out" / "inner", True, marker) as folder:
        fill(folder)
    assert names_in(tmp_path / "out" / "inner") == ["inner"]


def test_force_keeps_what_another_process_put_there_meanwhile(tmp_path):
    with refuses(InputError), atomic_folder(tmp_path / "out", force=True):
        (tmp_path / "out").mkdir()
        fill(tmp_path / "out", "theirs")
    assert (tmp_path / "out" / "inner" / "a.txt").read_text() == "theirs"


def test_a_place_that_cannot_be_looked_at_is_said(tmp_path, monkeypatch):
    with refuses(ResourceError):
        check_new_folder(tmp_path / ("x" * 5000))
    monkeypatch.setattr(type(tmp_path), "iterdir", denied)
    with refuses(ResourceError):
        check_new_folder(tmp_path)


@pytest.mark.parametrize("force", [False, True])
def test_an_empty_folder_is_filled(tmp_path, force):
    (tmp_path / "out").mkdir()
    with atomic_folder(f"{tmp_path}/out/", force) as folder:
        fill(folder)
    assert names_in(tmp_path) == ["out"] and names_in(tmp_path / "out") == ["inner"]


def test_what_another_process_put_there_meanwhile_is_kept(tmp_path):
    with refuses(InputError), atomic_folder(tmp_path / "out") as folder:
        fill(folder)
        (tmp_path / "out").mkdir()
        fill(tmp_path / "out", "theirs")
    assert (tmp_path / "out" / "inner" / "a.txt").read_text() == "theirs"


@pytest.mark.parametrize("force", [False, True])
def test_a_file_that_another_process_put_there_meanwhile_is_kept(tmp_path, force):
    with refuses(InputError), atomic_folder(tmp_path / "out", force) as folder:
        fill(folder)
        (tmp_path / "out").write_text("theirs")
    assert names_in(tmp_path) == ["out"] and (tmp_path / "out").read_text() == "theirs"


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("kind", ["file", "link to a folder", "dangling link", "newline", "zero"])
def test_a_place_that_is_no_folder_is_refused(tmp_path, kind, force):
    (tmp_path / "real").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "link to a folder").symlink_to(tmp_path / "real")
    (tmp_path / "dangling link").symlink_to(tmp_path / "nowhere")
    before = names_in(tmp_path)
    target = tmp_path / {"newline": "a\nb", "zero": "a\0b"}.get(kind, kind)
    with refuses(InputError), atomic_folder(target, force):
        pytest.fail("the block must not start")
    with refuses(InputError):
        check_new_folder(target, force)
    assert names_in(tmp_path) == before


def test_a_folder_below_a_file_is_said(tmp_path):
    (tmp_path / "file").touch()
    with refuses(ResourceError), atomic_folder(tmp_path / "file" / "out"):
        pytest.fail("the block must not start")


def test_files_behind_links_are_left_alone(tmp_path):
    (tmp_path / "theirs").touch(mode=0o600)
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "link").symlink_to(tmp_path / "theirs")
    assert (tmp_path / "theirs").stat().st_mode & 0o777 == 0o600


def test_what_a_killed_process_left_is_removed_and_what_another_fills_is_not(tmp_path):
    dead, theirs = tmp_path / ".out.ppf-abcdefgh", tmp_path / ".out.20261125"
    for folder in (dead / "inner", theirs):
        folder.mkdir(parents=True)
    with atomic_folder(tmp_path / "out") as folder:
        fill(folder)
        assert not dead.exists() and theirs.exists()
        artifact._remove_dead(tmp_path / "out")
        assert (folder / "inner" / "a.txt").exists()
    assert names_in(tmp_path) == [".out.20261125", "out"]


def test_unfinished_files_of_a_folder_are_removed(tmp_path):
    for name in (".study.json.ppf-abcdefgh", ".study.json.ppf-abc", ".hidden", "lock"):
        (tmp_path / name).touch()
    (tmp_path / ".folder.ppf-abcdefgh").mkdir()
    artifact.remove_unfinished(tmp_path)
    assert names_in(tmp_path) == [".folder.ppf-abcdefgh", ".hidden", ".study.json.ppf-abc", "lock"]
