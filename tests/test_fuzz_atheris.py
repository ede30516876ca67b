import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

READERS = ("salvage", "gguf", "weights", "plan", "ratios")
SECONDS = 60


def fuzz(reader, seconds, folder):
    """How libFuzzer ended, how many inputs it tried, and its last words."""
    script = Path(__file__).with_name("fuzz_atheris.py")
    environment = {**os.environ, "TMPDIR": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), reader, str(seconds)]
    # In a session of its own, a Ctrl-C that is for whoever runs this does not end it as if by itself, with 72.
    apart = {"cwd": folder, "env": environment, "start_new_session": True}
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 540, **apart)
    runs = re.search(r"Done (\d+) runs", done.stderr)
    return done.returncode, int(runs[1]) if runs else 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
def test_no_input_that_coverage_leads_to_breaks_a_reader(tmp_path, reader):
    pytest.importorskip("atheris", reason="needs ppf[fuzz]")
    code, runs, words = fuzz(reader, SECONDS, tmp_path)
    assert code != 72, "stopped from outside, by SIGINT or SIGTERM: run it again"
    assert code == 0 and runs > 0, words
