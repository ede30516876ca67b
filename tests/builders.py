"""Small values to test with, and the form that every refusal must have."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from hypothesis import settings

from ppf.errors import PPFError
from ppf.space.allocation import Allocation
from ppf.space.importance import Importance
from ppf.space.layout import Layout, Rows, Site
from ppf.space.mask import Mask, select
from ppf.study import read_sealed, write_sealed


def layout(
    layers: int = 2, heads: int = 4, groups: int = 2, head_dim: int = 16, hidden: int = 64, ffn: int = 172, vocab: int = 1000
) -> Layout:
    """The layout of a Llama of this shape, with untied embeddings."""
    sites = []
    queries = heads // groups * head_dim
    for layer in range(layers):
        attn, mlp = f"model.layers.{layer}.self_attn.", f"model.layers.{layer}.mlp."
        heads_rows = (Rows(attn + "q_proj", 0, queries), Rows(attn + "k_proj", 0, head_dim), Rows(attn + "v_proj", 0, head_dim))
        heads_shapes = (("num_attention_heads", heads // groups), ("num_key_value_heads", 1))
        cost = 2 * (queries + head_dim) * hidden
        sites.append(Site(layer, "attn", groups, cost, heads_rows, attn + "o_proj", queries, heads_shapes, 2 * head_dim))
        rows = (Rows(mlp + "gate_proj", 0, 1), Rows(mlp + "up_proj", 0, 1))
        sites.append(Site(layer, "ffn", ffn, 3 * hidden, rows, mlp + "down_proj", 1, (("intermediate_size", 1),)))
    prunable = sum(site.units * site.cost for site in sites)
    return Layout("llama", layers, tuple(sites), prunable + 2 * vocab * hidden + (2 * layers + 1) * hidden)


LAYOUTS = {
    "tiny": layout(),
    "llama-2-7b": layout(32, 32, 32, 128, 4096, 11008, 32000),
    "llama-3-8b": layout(32, 32, 8, 128, 4096, 14336, 128256),
}


def examples(count: int) -> settings:
    """So many examples of a property, the same in every run."""
    return settings(max_examples=count, deadline=None, derandomize=True)


def importance(of: Layout, seed: int = 0, levels: int = 20) -> Importance:
    """Random scores with many ties."""
    rng = np.random.default_rng(seed)
    return Importance(tuple(rng.integers(0, levels, units) / 7 for units in of.units), "random", f"seed {seed}")


def random_mask(of: Layout, seed: int = 0) -> Mask:
    """The most important units of a random allocation."""
    kept = np.random.default_rng(seed).integers(of.floors, of.units + 1)
    return select(Allocation(kept), importance(of, seed), of)


def copied(fitted: Any, folder: Path, **model: Any) -> Path:
    """The study in another place, and what it says of itself changed."""
    shutil.copytree(fitted.folder, folder)
    record = read_sealed(folder / "study.json")
    seed = model.pop("seed", record["settings"]["seed"])
    record["model"] |= model
    record["settings"] |= {"seed": seed}
    write_sealed(folder / "study.json", record)
    return folder


def names_in(folder: Path) -> list[str]:
    """What lies in a folder."""
    return sorted(path.name for path in folder.iterdir())


def full_disk(*_: object) -> NoReturn:
    """Stands in for a system call when the disk is full."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def interrupted(*_: object) -> NoReturn:
    """Stands in for a call during which Ctrl-C comes."""
    raise KeyboardInterrupt


@contextmanager
def refuses(kind: type[PPFError]) -> Iterator[pytest.ExceptionInfo]:
    """The block raises exactly this error, in one line that says what must hold, what came, and what to do."""
    with pytest.raises(kind) as caught:
        yield caught
    message = str(caught.value)
    assert caught.type is kind, message
    assert "\n" not in message
    assert message.count("; ") >= 2, message
