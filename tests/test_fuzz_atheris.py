import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

RUNS = 3_000


@pytest.mark.slow
@pytest.mark.parametrize("reader", ["salvage", "gguf", "weights", "plan", "ratios"])
def test_no_input_that_coverage_leads_to_breaks_a_reader(tmp_path, reader):
    pytest.importorskip("atheris", reason="needs ppf[fuzz]")
    script = Path(__file__).with_name("fuzz_atheris.py")
    environment = {**os.environ, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), reader, str(RUNS)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(rf"Done {RUNS} runs", done.stderr)
