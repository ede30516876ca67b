"""Pruned tiny models, and a process that knows nothing of ppf to read what was exported of them."""

import os
import subprocess
import sys

import torch

import tiny_models as tiny
from builders import random_mask
from ppf.llm.architectures import layout_of_model
from ppf.llm.depth import with_depth
from ppf.llm.surgery import cut


def smaller(name="llama-gqa-tied", seed=3, dtype=torch.float32):
    name, _, gone = name.partition("+")  # which sub-layers are gone as a whole
    model = tiny.model(name, dtype=dtype)
    layout = layout_of_model(model)
    if gone:
        layout = with_depth(model, layout)
    return cut(model, layout, (tiny.DEPTH_MASKS | tiny.EXPERT_MASKS)[gone](layout) if gone else random_mask(layout, seed))


def label(name, dtype):
    return f"{name}-{str(dtype).removeprefix('torch.')}"


def run_without_ppf(script, home, *arguments):
    """Runs a script offline with nothing of ours in its reach; what it printed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", "-c", script, *map(str, arguments)]
    done = subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
