"""Real workers that may have only so much memory: a limit of the system's, set when all is imported and the model is open."""

import sys
from contextlib import closing

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import tiny_models as tiny
from builders import refuses
from ppf.errors import ResourceError
from ppf.llm.architectures import layout_of_model
from ppf.llm.engines.bench import InProcessEngine
from ppf.llm.engines.local import LocalEngine
from ppf.llm.text import Text
from ppf.space.allocation import Allocation
from ppf.space.importance import Importance
from ppf.space.mask import select

ROWS, LENGTH = 16, 128
LONG = 8192
WIDE = {
    "vocab_size": tiny.VOCAB, "hidden_size": 16, "intermediate_size": 16_384, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": LONG,
}  # fmt: skip
"""Tokens of a block that does not fit; one tensor of its FFN takes 512 MiB, and one of all other blocks together 128 MiB."""
WORKER = """#!{python}
import resource, runpy
from ppf.llm import perplexity
from ppf.llm.engines import service
opened, states_of = service.load_model, perplexity.states_of

def limited(folder):
    loaded = opened(folder)
    now = 1024 * int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1])
    resource.setrlimit(resource.RLIMIT_AS, (now + {room}, now + {room}))
    return loaded

def counted(model, rows):
    states = states_of(model, rows)
    with open("{sizes}", "a") as file:
        print(len(rows), file=file)
    return states

service.load_model, perplexity.states_of = limited, counted
runpy.run_module("ppf.llm.engines.worker", run_name="__main__")
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model that needs much memory for its size, its text, and the model itself."""
    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**WIDE)).eval()
    model.save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    long, short = np.resize(tiny.blocks(1, 4000), (1, LONG)), tiny.blocks(ROWS, LENGTH)
    for name, search in (("text", short), ("long", long)):
        Text(name, short[:1], search, short[:0], long).save(folder / name, layout_of_model(model).fingerprint)
    return folder, model


def limited(monkeypatch, folder, room):
    """Puts workers that may take so many bytes more than they have in the place of others."""
    program = folder / f"python{room}"
    program.write_text(WORKER.format(python=sys.executable, room=room, sizes=folder / "sizes"))
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):  # as for any worker
        monkeypatch.delenv(name, raising=False)


def masks(layout, *shares):
    order = Importance(tuple(np.arange(units, dtype=float) for units in layout.units), "none", "none")
    return [select(Allocation(np.maximum(layout.floors, (layout.units * share).astype(int))), order, layout) for share in shares]


def test_a_worker_short_of_memory_halves_its_batches_and_what_does_not_fit_alone_is_a_failure(place, monkeypatch):
    folder, model = place
    layout = layout_of_model(model)
    wanted = masks(layout, 0.9, 0.5, 0.01)
    here = InProcessEngine(model, layout, Text.load(folder / "text", layout.fingerprint), ROWS * LENGTH)
    expected = dict(here.measure(wanted))
    limited(monkeypatch, folder, 300 * 2**20)
    with closing(LocalEngine(folder / "model", folder / "text", layout, "float32", 1, ROWS * LENGTH)) as engine:
        found = dict(engine.measure(wanted))
        sizes = [int(size) for size in (folder / "sizes").read_text().split()]
        lost = dict(engine.measure(wanted[:1], "test"))
        after = dict(engine.measure(wanted))
    assert ROWS not in sizes[:2] and max(sizes[:2]) <= ROWS // 2 and min(sizes) >= ROWS // 8  # halved three times at most
    for index, result in found.items():
        assert result.reason == "" and result.log_ppl == pytest.approx(expected[index].log_ppl, rel=1e-6)
        assert result.kl == pytest.approx(expected[index].kl, rel=1e-6, abs=1e-9)
    assert "must fit in memory" in lost[0].reason and np.isnan(lost[0].log_ppl)
    assert {index: (one.log_ppl, one.kl) for index, one in after.items()} == {i: (one.log_ppl, one.kl) for i, one in found.items()}


def test_where_not_even_one_block_of_the_dense_model_fits_the_measuring_ends_and_says_so(place, monkeypatch):
    folder, model = place
    layout = layout_of_model(model)
    limited(monkeypatch, folder, 300 * 2**20)
    with (
        closing(LocalEngine(folder / "model", folder / "long", layout, "float32", 1, LONG)) as engine,
        refuses(ResourceError) as caught,
    ):
        list(engine.measure(masks(layout, 0.9)))
    assert "must fit in memory" in str(caught.value)
