import errno
import io
import json
import os
from pathlib import Path

import pytest

from builders import refuses
from ppf.errors import DamagedError, PPFError, ResourceError, UnsupportedError
from ppf.llm import weights
from ppf.llm.export import weight_bytes
from ppf.llm.load import load_model
from ppf.llm.weights import weight_files


def sharded(folder):
    """The weights as one shard under an index."""
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "part.safetensors"}}))


def test_only_weights_count_that_transformers_loads(folder):
    size = (folder / "model.safetensors").stat().st_size
    (folder / "consolidated.safetensors").write_bytes(bytes(1000))
    assert weight_files(folder) == [folder / "model.safetensors"] and weight_bytes(folder) == size
    sharded(folder)
    assert weight_files(folder) == [folder / "part.safetensors"] and weight_bytes(str(folder)) == size


def test_a_folder_without_weights_has_no_size(folder, monkeypatch):
    (folder / "model.safetensors").unlink()
    with refuses(DamagedError):
        weight_bytes(folder)
    (folder / "pytorch_model.bin").touch()
    with refuses(UnsupportedError):
        weight_bytes(folder)
    with refuses(DamagedError):
        weight_bytes(folder / ("x" * 200))
    with refuses(ResourceError):
        weight_bytes(folder / ("x" * 5000))


@pytest.mark.parametrize("step", ["is_dir", "is_file", "iterdir", "stat"])
def test_what_the_system_refuses_is_said(folder, monkeypatch, step):
    normal = getattr(Path, step)

    def denied(path, *args, **options):
        if path.is_relative_to(folder):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return normal(path, *args, **options)

    monkeypatch.setattr(Path, step, denied)
    with refuses(ResourceError):
        load_model(str(folder))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json"])
def test_a_file_that_cannot_be_opened_is_said(folder, monkeypatch, name):
    if "index" in name:
        sharded(folder)
    normal = io.open

    def denied(path, *args, **options):
        if str(path) == str(folder / name):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return normal(path, *args, **options)

    monkeypatch.setattr(io, "open", denied)
    monkeypatch.setattr(weights, "open", denied, raising=False)
    with pytest.raises(PPFError) as caught:
        load_model(str(folder))
    with refuses(type(caught.value)):
        raise caught.value
