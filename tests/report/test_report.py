import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from builders import names_in, refuses
from ppf import cli
from ppf.config import ReportConfig
from ppf.errors import DamagedError, InputError
from ppf.report import write_report
from ppf.study import read_sealed, write_sealed


def test_the_command_writes_one_file(study, tmp_path, capsys):
    out = tmp_path / "report.html"
    out.write_text("an older one")

    def files():
        return [name for name in names_in(study.folder) if not name.endswith(("-wal", "-shm"))]  # SQLite's, while it reads

    before = files()
    assert cli.main(["report", str(study.folder), "--out", str(out)]) == 0
    assert str(out) in capsys.readouterr().out and names_in(tmp_path) == ["report.html"] and files() == before
    made = out.read_text()
    assert made.startswith("<!doctype html>") and "plotly.js v" in made


def test_the_same_study_gives_the_same_file(study, tmp_path):
    files = [write_report(ReportConfig(str(study.folder), str(tmp_path / name))) for name in ("a.html", "b.html")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_folder_in_the_place_of_the_file_is_refused(study, tmp_path):
    with refuses(InputError):
        write_report(ReportConfig(str(study.folder), str(tmp_path)))


def test_a_wrong_bench_writes_nothing(study, tmp_path):
    (tmp_path / "bench.json").write_text("{}")
    with refuses(DamagedError):
        write_report(ReportConfig(str(study.folder), str(tmp_path / "r.html"), (str(tmp_path / "bench.json"),)))
    assert names_in(tmp_path) == ["bench.json"]


@pytest.mark.parametrize("arguments", [["none"], ["--out", "x"]])
def test_a_wrong_command_line_is_one_line(arguments, capsys):
    assert cli.main(["report", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and err.count("; ") >= 2


def test_no_torch_is_needed(study, tmp_path):
    code = (
        "import sys; from ppf.config import ReportConfig; from ppf.report import write_report;"
        f"write_report(ReportConfig({str(study.folder)!r}, {str(tmp_path / 'r.html')!r}));"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


@pytest.mark.parametrize(
    ("file", "spoil"),
    [
        ("report.json", lambda record: record["heldout"]["additive"].pop("tau_within")),
        ("report.json", lambda record: record.update(seconds={"search": "long"})),
        ("report.json", lambda record: record.update(made="yesterday")),
        ("study.json", lambda record: record["dense"]["test"].pop("interval")),
    ],
)
def test_a_record_that_is_not_whole_is_one_line(study, tmp_path, file, spoil):
    folder = Path(shutil.copytree(study.folder, tmp_path / "study"))
    record = read_sealed(folder / file)
    spoil(record)
    write_sealed(folder / file, record)
    with refuses(DamagedError):
        write_report(ReportConfig(str(folder), str(tmp_path / "r.html")))
    assert not (tmp_path / "r.html").exists()
