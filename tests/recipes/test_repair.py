import json
import os
import random
import shlex
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

import ppf
from builders import full_disk, names_in, refuses
from fit_runs import again, measured
from ppf import cli
from ppf import repair as module
from ppf.config import FitConfig
from ppf.errors import MEND, DamagedError, InputError, InUseError, NewerError, PPFError, ResourceError
from ppf.fit_command import fit_command
from ppf.lock import locked
from ppf.repair import repair
from ppf.study import StudyFolder, read_sealed, write_sealed
from stores_made import cut_off, samples_of, zero

MADE = ("importance", "predictor", "agent", "nested", "text")
FILES = [*(f"{name}.safetensors" for name in MADE), "plans.json", "report.json"]


def flip(path, place=-9):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_of_a_whole_study_nothing_is_changed(copy):
    before = {path.name: path.read_bytes() for path in copy.iterdir() if path.suffix in (".json", ".safetensors", ".sqlite")}
    assert repair(copy) == {"aside": [], "samples": len(samples_of(copy)), "fit": None, "sure": False}
    assert {name: (copy / name).read_bytes() for name in before} == before


@pytest.mark.parametrize("file", FILES)
def test_what_is_damaged_is_set_aside(copy, file):
    flip(copy / file)
    damaged = (copy / file).read_bytes()
    (one,) = repair(copy)["aside"]
    assert (one["file"], one["to"]) == (file, f"{file}.damaged") and one["why"]
    assert not (copy / file).exists() and (copy / f"{file}.damaged").read_bytes() == damaged


def test_a_fit_makes_them_all_again_from_the_samples_and_says_so(copy, capsys):
    whole, samples = {name: (copy / f"{name}.safetensors").read_bytes() for name in MADE}, measured(copy)
    for file in FILES:
        flip(copy / file)
    again(copy, quiet=False)
    said = capsys.readouterr().err
    assert all(f"{file} is damaged" in said and (copy / f"{file}.damaged").exists() for file in FILES)
    assert {name: (copy / f"{name}.safetensors").read_bytes() for name in MADE} == whole and measured(copy) == samples


@pytest.mark.parametrize("file", FILES[1:4])
def test_until_then_it_is_refused_with_what_to_do(copy, file):
    flip(copy / file)
    with refuses(DamagedError) as caught:
        study = ppf.Study(copy)
        study.policy(ratio=0.3, nested=True)
    assert MEND in str(caught.value)


def test_a_damaged_store_is_refused_and_repaired(copy):
    before = samples_of(copy)
    for page in (0, 1):
        zero(copy / "samples.sqlite", page)
    damaged = (copy / "samples.sqlite").read_bytes()
    with refuses(DamagedError) as caught:
        again(copy)
    assert "ppf repair" in str(caught.value)
    found = repair(copy)
    assert [one["file"] for one in found["aside"]] == ["samples.sqlite"] and found["samples"] > 0
    assert (copy / "samples.sqlite.damaged").read_bytes() == damaged
    assert set(samples_of(copy)) <= set(before) and len(samples_of(copy)) == found["samples"]
    assert repair(copy)["aside"] == []


def test_a_log_without_its_store_is_not_played_over_the_repaired_one(copy):
    with closing(StudyFolder(copy).store(write=True)) as store:
        sample = store.all()[0]
        store.add(sample)
        log = (copy / "samples.sqlite-wal").read_bytes()
    assert log
    (copy / "samples.sqlite").unlink()
    (copy / "samples.sqlite-wal").write_bytes(log)
    found = repair(copy)
    assert len(samples_of(copy)) == found["samples"] and "samples.sqlite" in [one["file"] for one in found["aside"]]


def test_a_write_that_was_cut_off_without_a_log_is_undone_and_nothing_is_lost(copy):
    before = samples_of(copy)
    cut_off(copy / "samples.sqlite")
    with refuses(DamagedError):
        samples_of(copy)
    assert repair(copy)["aside"] == [] and samples_of(copy) == before


@pytest.mark.parametrize("is_hot", [True, False])
def test_the_disk_holds_the_copy_before_it_takes_the_place_of_the_store(copy, monkeypatch, is_hot):
    """SQLite sees to that only where it undid something."""
    if is_hot:
        cut_off(copy / "samples.sqlite")
    else:
        (copy / "samples.sqlite-journal").write_bytes(bytes(512))
    before, order, sync, rename = len(samples_of(copy)) if not is_hot else 0, [], module.sync, os.rename
    monkeypatch.setattr(module, "sync", lambda path: order.append(("sync", path)) or sync(path))
    monkeypatch.setattr(module.os, "rename", lambda source, target: order.append(("rename", source)) or rename(source, target))
    found = repair(copy)
    undone = next(path for what, path in order if what == "rename")
    assert order == [("sync", undone), ("rename", undone), ("sync", copy)]
    assert found["aside"] == [] and found["samples"] >= max(before, 1)


def test_where_not_all_of_a_journal_is_whole_nothing_is_undone_in_place(copy):
    """SQLite would undo what it can and take the journal away."""
    before = samples_of(copy)
    cut_off(copy / "samples.sqlite")
    journal = copy / "samples.sqlite-journal"
    journal.write_bytes(journal.read_bytes()[: journal.stat().st_size // 2])
    parts = {name: (copy / name).read_bytes() for name in ("samples.sqlite", "samples.sqlite-journal")}
    assert repair(copy)["samples"] > 0 and set(samples_of(copy)) <= set(before)
    for name, content in parts.items():
        assert (copy / name.replace("sqlite", "sqlite.damaged")).read_bytes() == content


def test_a_journal_is_no_database(copy):
    (copy / "samples.sqlite.damaged-journal").write_bytes((copy / "samples.sqlite").read_bytes())
    (copy / "samples.sqlite").unlink()
    assert repair(copy)["samples"] == 0


def test_a_store_of_a_newer_ppf_is_left_alone(copy):
    with closing(sqlite3.connect(copy / "samples.sqlite")) as database:
        database.execute("PRAGMA user_version=99")
    before = (copy / "samples.sqlite").read_bytes()
    with refuses(NewerError):
        repair(copy)
    assert (copy / "samples.sqlite").read_bytes() == before and not list(copy.glob("*.damaged"))


def test_altered_rows_are_left_behind(copy):
    count = len(samples_of(copy))
    data = (copy / "samples.sqlite").read_bytes()
    row = samples_of(copy)[3]
    (copy / "samples.sqlite").write_bytes(data.replace(row.digest.encode(), b"x" * 32))
    assert repair(copy)["samples"] == count - 1 and (copy / "samples.sqlite.damaged").exists()


@pytest.mark.parametrize("damage", ["missing", "cut", "a digit", "no layout"])
def test_without_its_record_the_samples_are_what_is_left_and_the_same_fit_needs_no_more(copy, fitted, damage):
    text, path = StudyFolder(copy).record["settings"]["text"], copy / "study.json"
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-50])
    elif damage == "a digit":
        path.write_text(path.read_text().replace("60", "61", 1))
    else:
        write_sealed(path, read_sealed(path) | {"layout": {}})
    if damage != "missing":
        with refuses(DamagedError) as caught:
            again(copy, text)
        assert "ppf repair" in str(caught.value) or damage == "no layout"
    found = repair(copy)
    assert found["samples"] == len(samples_of(fitted.folder))
    whys = {one["file"]: one["why"] for one in found["aside"]}
    assert "study.json" not in whys.pop("study.json", "") and set(whys) == set(FILES)
    assert set(whys.values()) == {"without study.json nothing says what it belongs to"}
    left = {name for name in names_in(copy) if "damaged" not in name and not name.startswith("samples.sqlite-")}
    assert left == {"samples.sqlite", "lock"}
    if damage == "a digit":
        assert again(copy, text).report["heldout"] == fitted.report["heldout"]
        assert measured(copy) == measured(fitted.folder)


def test_a_store_that_is_gone_is_not_begun_anew_without_a_word(copy):
    (copy / "report.json").unlink()
    for damage in (Path.unlink, lambda path: path.write_bytes(b"")):
        damage(copy / "samples.sqlite")
        with refuses(DamagedError):
            again(copy)
        assert repair(copy)["samples"] == 0


def test_a_study_of_a_newer_ppf_is_left_alone(copy):
    write_sealed(copy / "study.json", read_sealed(copy / "study.json") | {"version": 99})
    before = names_in(copy)
    with refuses(DamagedError) as caught:
        repair(copy)
    assert "newer ppf" in str(caught.value) and names_in(copy) == before


def test_what_is_no_study_or_in_use_is_refused(copy, tmp_path):
    for folder in (tmp_path / "none", tmp_path):
        with refuses(InputError):
            repair(folder)
    with locked(copy), refuses(InUseError):
        repair(copy)
    assert names_in(tmp_path) == ["study"]


def test_names_that_are_taken_are_left(copy):
    for _ in range(3):
        zero(copy / "samples.sqlite", 1)
        repair(copy)
    assert {"samples.sqlite.damaged", "samples.sqlite.damaged2", "samples.sqlite.damaged3"} <= set(names_in(copy))


@pytest.mark.parametrize("failing", [1, 2])
def test_a_repair_that_was_stopped_begins_again_and_loses_nothing(copy, monkeypatch, failing):
    before, rename, calls = set(samples_of(copy)), os.rename, []
    flip(copy / "samples.sqlite", 20)
    zero(copy / "samples.sqlite", 0)

    def stop(source, target):
        calls.append(source)
        return full_disk() if len(calls) == failing else rename(source, target)

    with monkeypatch.context() as patch, pytest.raises((OSError, PPFError)):
        patch.setattr(module.os, "rename", stop)
        repair(copy)
    repair(copy)
    assert set(samples_of(copy)) == before and not [name for name in names_in(copy) if ".ppf-" in name]


def test_a_disk_that_is_full_is_said(copy, monkeypatch):
    zero(copy / "samples.sqlite", 1)
    monkeypatch.setattr(module.os, "rename", full_disk)
    with refuses(ResourceError):
        repair(copy)
    assert (copy / "samples.sqlite").exists()


def test_the_command(copy, capsys):
    zero(copy / "samples.sqlite", 1)
    flip(copy / "agent.safetensors")
    assert cli.main(["repair", str(copy)]) == 0
    out = capsys.readouterr().out
    assert "set aside as samples.sqlite.damaged" in out and "agent.safetensors" in out and "samples are whole" in out
    assert cli.main(["repair", str(copy), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["aside"] == []
    assert cli.main(["repair", str(copy / "none")]) == 2


@pytest.mark.parametrize("damage", ["an artefact", "missing", "cut", "a digit", "both"])
def test_the_command_that_makes_the_rest_again_is_printed(copy, capsys, damage):
    settings = {"model": "models/a b", "text": "a.txt", "samples": 60, "depth": True, "device": "cpu", "max_ratio": 0.5}
    for name in ("study.json", "report.json"):
        record = read_sealed(copy / name)
        write_sealed(copy / name, record | {"settings": {**record["settings"], **settings, "study": "elsewhere", "workers": None}})
    words = "--text a.txt --samples 60 --max-ratio 0.5"
    if damage == "missing":
        (copy / "study.json").unlink()
    else:
        flip(copy / "agent.safetensors")
    if damage in ("cut", "both"):
        (copy / "study.json").write_bytes((copy / "study.json").read_bytes()[:-50])
    if damage == "both":
        (copy / "report.json").unlink()
    if damage == "a digit":
        text = (copy / "study.json").read_text()
        (copy / "study.json").write_text(text.replace('"samples": 60', '"samples": 61'))
    for _ in range(2 if damage != "an artefact" else 1):  # what was set aside is read too
        assert cli.main(["repair", str(copy)]) == 0
        out = capsys.readouterr().out
        command = next(line for line in out.splitlines() if line.startswith("next"))
        found = shlex.split(command)[1:]
        assert found[:5] == ["ppf", "fit", "models/a b", "--study", str(copy)] and words in command, command
        assert "--depth" in found and "None" not in command
        assert ("compare it" in out) == (damage == "both")
        assert isinstance(cli._parse(found[1:]), FitConfig)


def test_where_nothing_tells_the_command_that_is_said(copy, capsys):
    for name in ("study.json", "report.json"):
        (copy / name).unlink()
    assert cli.main(["repair", str(copy)]) == 0
    out = capsys.readouterr().out
    assert "which no file tells any more" in out and out.endswith("from the samples.\n")


def test_a_command_without_a_checksum_is_to_be_compared(copy, capsys):
    """Records of earlier versions have none."""
    for name in ("study.json", "report.json"):
        record = read_sealed(copy / name)
        settings = {**record["settings"], "model": "a", "workers": None}
        (copy / name).write_text(json.dumps(record | {"settings": settings}))
    flip(copy / "agent.safetensors")
    assert cli.main(["repair", str(copy)]) == 0
    out = capsys.readouterr().out
    assert "ppf fit a --study" in out and "compare it" in out and out.endswith("\n")


def test_a_folder_in_the_place_of_a_record_is_said(copy):
    for name in ("study.json", "report.json"):
        (copy / name).unlink()
        (copy / name).mkdir()
    assert fit_command(copy) == (None, False)
    with refuses(ResourceError):
        repair(copy)


def test_no_cut_and_no_flip_of_any_file_bricks_a_study(copy, fitted):
    """Whatever happens to the files of a study, a repair ends, and what it leaves is read or refused in one line."""
    rng, whole, names = random.Random(0), {path.name: path.read_bytes() for path in copy.iterdir()}, ["study.json", *FILES]
    before = set(samples_of(copy))
    for number in range(60):
        name = names[number % len(names)]
        data = bytearray(whole[name])
        if number % 3 == 0:
            del data[rng.randrange(len(data)) :]
        else:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        (copy / name).write_bytes(data)
        repair(copy)
        try:
            ppf.Study(copy).policy(ratio=0.3)
        except PPFError as error:
            assert str(error).count("; ") >= 2 and "\n" not in str(error)
        for path in copy.iterdir():
            path.unlink()
        for file, content in whole.items():
            (copy / file).write_bytes(content)
    assert set(samples_of(copy)) == before
