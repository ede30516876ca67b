"""Model folders from a stranger: nothing in them is run, nothing outside them is read, and none keeps the reader busy."""

import json
import os
import pickle
import pty
import re
import resource
import shutil
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import ppf
import tiny_models as tiny
from builders import refuses
from ppf.errors import DamagedError, InputError, PPFError, UnsupportedError
from ppf.llm import weights
from ppf.llm.architectures import skeleton
from ppf.llm.load import load_model, read_config
from ppf.llm.weights import check_weights

LOAD = """
import sys
from ppf.errors import PPFError
from ppf.llm.load import load_model
try:
    load_model(sys.argv[1])
except PPFError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


def loads(folder, *before, **options):
    """Loading as a process, below other commands."""
    environment = {**os.environ, "PYTHONPATH": str(Path(ppf.__file__).parents[1]), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [*before, sys.executable, "-c", LOAD, str(folder)]
    return subprocess.run(command, text=True, env=environment, **{"capture_output": True, **options})


def set_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


# --- configs ---

HOSTILE = {
    "100,000 layers": {"num_hidden_layers": 100_000},
    "a layer more": {"num_hidden_layers": 4}, "a layer less": {"num_hidden_layers": 2},
    "wide": {"hidden_size": 10**7}, "wider": {"hidden_size": 2**40}, "no heads": {"num_attention_heads": 0},
    "no groups": {"num_key_value_heads": 0}, "groups that do not divide": {"num_key_value_heads": 3},
    "NaN": {"rms_norm_eps": float("nan")}, "infinite": {"rope_theta": float("inf")}, "half a layer": {"num_hidden_layers": 2.5},
    "a text": {"hidden_size": "32"}, "minus": {"intermediate_size": -40}, "no vocabulary": {"vocab_size": 0},
}  # fmt: skip
TEXTS = {
    "empty": b"",
    "a list": b"[]",
    "too large a number": b'{"model_type": "llama", "rms_norm_eps": 1e999}',
    "50 MB": b" " * 50 * 2**20,
}


def in_time(folder):
    """Loading is refused within two seconds and 500 MB."""
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises((DamagedError, UnsupportedError)) as caught:
        load_model(str(folder))
    with refuses(type(caught.value)):
        raise caught.value
    assert time.perf_counter() - start < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500 * 1024


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_config_is_refused_in_time(folder, kind):
    set_config(folder, **HOSTILE[kind])
    in_time(folder)


@pytest.mark.parametrize("kind", TEXTS)
def test_a_file_that_is_no_config_is_refused_in_time(folder, kind):
    (folder / "config.json").write_bytes(TEXTS[kind])
    in_time(folder)


@pytest.mark.parametrize("kind", ["t5", "bart", "mamba", "rwkv", "jamba", "deepseek_v3", "gpt2", "unheard_of"])
def test_a_family_that_is_not_known_is_refused_whatever_its_weights(tmp_path, kind):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
    with refuses(UnsupportedError) as caught:
        load_model(str(tmp_path))
    assert "llama" in str(caught.value) and len(list(tmp_path.iterdir())) == 2


def test_an_adapter_alone_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "x/y"}')
    with refuses(UnsupportedError) as caught:
        load_model(str(tmp_path))
    assert "merge" in str(caught.value)


# --- weight files ---


def test_every_cut_of_the_header_and_many_of_the_weights_are_refused(folder, whole):
    path, data = folder / "model.safetensors", (whole / "model.safetensors").read_bytes()
    header = 8 + struct.unpack("<Q", data[:8])[0]
    cuts = [*range(header), *np.linspace(header, len(data) - 1, 200, dtype=int).tolist()]
    start = time.perf_counter()
    for cut in cuts:
        path.write_bytes(data[:cut])
        with pytest.raises(DamagedError):
            list(weights._header(path))
    assert (time.perf_counter() - start) / len(cuts) < 0.5
    for damaged in (data + b"\0", *(struct.pack("<Q", size) + data[8:] for size in (2**63, 2**64 - 1, 100_000_001))):
        path.write_bytes(damaged)
        with refuses(DamagedError):
            list(weights._header(path))


def test_a_header_of_many_tensors_is_refused_unread(folder):
    entries = ",".join(
        f'"{index:06d}":{{"dtype":"U8","shape":[1],"data_offsets":[{index},{index + 1}]}}' for index in range(300_000)
    )
    text = f"{{{entries}}}".encode()
    assert len(text) > 16 * 2**20
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(300_000))
    shell, start, before = skeleton(read_config(folder)), time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with refuses(DamagedError):
        check_weights(folder, shell)
    assert time.perf_counter() - start < 0.5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024


def shards(folder, **places):
    """The weights in two shards under an index that may say otherwise."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, index = sorted(weights), {}
    for file, half in (("a.safetensors", names[::2]), ("b.safetensors", names[1::2])):
        save_file({name: weights[name] for name in half}, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(half, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index | places}))
    return weights


def test_shards_are_read_and_each_weight_must_be_in_one(folder):
    weights = shards(folder)
    load_model(str(folder))
    twice = min(weights)
    other = load_file(folder / "b.safetensors") | {twice: weights[twice]}
    save_file(other, folder / "b.safetensors", metadata={"format": "pt"})
    with refuses(DamagedError) as caught:
        load_model(str(folder))
    assert twice in str(caught.value) and "twice" in str(caught.value)


def outside(folder):
    """Shards that lie elsewhere, each as its name in the index."""
    shutil.copy(folder / "b.safetensors", folder.parent / "outside.safetensors")
    (folder / "link.safetensors").symlink_to(folder.parent / "outside.safetensors")
    (folder / "loop.safetensors").symlink_to("loop.safetensors")
    return ["../outside.safetensors", "/etc/passwd", "link.safetensors", "loop.safetensors", "none.safetensors"]


def test_a_shard_that_lies_elsewhere_is_refused(folder):
    weights = shards(folder)
    for place in outside(folder):
        index = {"weight_map": dict.fromkeys(weights, "a.safetensors") | {min(weights): place}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with refuses(DamagedError):
            load_model(str(folder))


def test_links_into_the_cache_of_the_hub_are_followed(whole, tmp_path):
    commit = tmp_path / "models--a--b" / "snapshots" / "c0ffee"
    (tmp_path / "models--a--b" / "blobs").mkdir(parents=True)
    commit.mkdir(parents=True)
    for path in whole.iterdir():
        blob = tmp_path / "models--a--b" / "blobs" / f"{path.name}-hash"
        shutil.copy(path, blob)
        (commit / path.name).symlink_to(os.path.relpath(blob, commit))
    assert load_model(str(commit)).layout.layers == 3


def test_nothing_outside_is_opened(folder, tmp_path):
    """Needs strace."""
    weights = shards(folder)
    place = outside(folder)[2]
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(weights, place)}))
    trace = tmp_path / "trace"
    done = loads(folder, "strace", "-f", "-qq", "-e", "trace=open,openat", "-o", str(trace))
    assert done.returncode == 1 and "DamagedError" in done.stderr
    opened = set(re.findall(r'openat?\([^"]*"([^"]+)"', trace.read_text()))
    assert any(str(folder) in name for name in opened)
    assert not [name for name in opened if name.endswith(("outside.safetensors", "/etc/passwd", "link.safetensors"))]


# --- pickles and code ---


class Evil:
    """A pickle that leaves a trace when it is opened."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return (Path.touch, (self.canary,))


def zipped(path, raw, damaged=False):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", raw)
        archive.writestr("archive/version", "3")
    if damaged:
        data = bytearray(path.read_bytes())
        data[data.rindex(b"PK\x01\x02") + 16] ^= 0xFF  # the CRC
        path.write_bytes(data)


def plant(folder, kind, canary):
    """A malicious pickle in one of its guises, and what is to be read."""
    raw, evil = pickle.dumps(Evil(canary)), np.array([Evil(canary)], dtype=object)
    names = {"raw": "pytorch_model.bin", "training": "optimizer.pt", "random": "rng_state.pth", "distributed": ".metadata"}
    if kind in names:
        (folder / names[kind]).write_bytes(raw)
    elif kind.startswith("zip"):
        zipped(folder / "pytorch_model.bin", raw, damaged="CRC" in kind)
    elif kind == "as safetensors":
        (folder / "model.safetensors").write_bytes(raw)
    elif kind == "as a tokenizer":
        (folder / "tokenizer.json").write_bytes(raw)
    elif kind == "npy":
        np.save(folder / "weights.npy", evil, allow_pickle=True)
    elif kind == "npz":
        np.savez(folder / "weights.npz", evil, allow_pickle=True)


KINDS = ["raw", "zip", "zip of a bad CRC", "training", "random", "distributed", "as safetensors", "as a tokenizer", "npy", "npz"]


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_no_pickle_is_opened_in_any_guise(folder, kind, beside):
    canary = folder.parent / "ran"
    if not beside:
        (folder / "model.safetensors").unlink()
    plant(folder, kind, canary)
    start = time.perf_counter()
    try:
        load_model(str(folder))
    except PPFError as error:
        assert "\n" not in str(error) and (not beside or kind.startswith("as "))
    else:
        assert beside
    assert not canary.exists() and time.perf_counter() - start < 2
    pickle.loads(pickle.dumps(Evil(canary)))  # noqa: S301 (it would have run)
    assert canary.exists()


@pytest.mark.parametrize("name", ["agent", "samples", "study"])
def test_no_file_of_a_study_is_opened_as_a_pickle(tmp_path, name):
    from ppf.artifact import load_artifact
    from ppf.samples import SampleStore
    from ppf.study import StudyFolder

    path, canary = tmp_path / "study.json", tmp_path / "ran"
    path.write_bytes(pickle.dumps(Evil(canary)))
    reads = {
        "agent": lambda: load_artifact(path, "agent"),
        "samples": lambda: SampleStore(path, "c"),
        "study": lambda: StudyFolder(tmp_path),
    }  # fmt: skip
    with refuses(DamagedError):
        reads[name]()
    assert not canary.exists()


@pytest.mark.parametrize(
    "answer", [pytest.param("y\n" * 20, id="yes on a terminal"), pytest.param(None, id="no input", marks=pytest.mark.slow)]
)
def test_code_in_a_folder_is_never_run_nor_asked_for(folder, answer):
    canary = folder.parent / "ran"
    (folder / "evil.py").write_text(f"open({str(canary)!r}, 'w')\nclass Evil: pass\n")
    classes = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil", "AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        record = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        (folder / name).write_text(json.dumps(record | {"auto_map": classes, "custom_generate": "evil.py"}))
    (folder / "custom_generate").mkdir()
    shutil.copy(folder / "evil.py", folder / "custom_generate" / "generate.py")
    if answer is None:
        done = loads(folder, stdin=subprocess.DEVNULL)
    else:
        ours, theirs = pty.openpty()
        os.write(ours, answer.encode())
        done = loads(folder, stdin=theirs, timeout=100)
        os.close(ours)
        os.close(theirs)
    assert not canary.exists() and "[y/N]" not in done.stdout + done.stderr and "Traceback" not in done.stderr


def test_the_command_line_has_no_flag_for_it(capsys):
    from ppf import cli
    from ppf.commands import COMMANDS

    for command in COMMANDS:
        cli.main([command, "--help"])
        assert "remote" not in capsys.readouterr().out.replace("Ray", "")


def test_no_source_file_opens_pickles_or_runs_text():
    """Beside the rules S301, S302, S307, S506 and S6 that every check runs."""
    wanted = re.compile(
        r"torch\.load\(|allow_pickle=True|cloudpickle|\bpickle\b\.|(?<![.\w])(eval|exec)\(|trust_remote_code=True|shell=True"
    )
    for path in Path(ppf.__file__).parent.rglob("*.py"):
        assert not wanted.search(path.read_text(encoding="utf-8")), path


# --- tokenizers ---


def test_a_tokenizer_of_another_size_is_refused_with_both_sizes(folder):
    tiny.tokenizer(words=200).save_pretrained(folder)
    with refuses(InputError) as caught:
        load_model(str(folder))
    assert "96" in str(caught.value) and "202" in str(caught.value)


def test_weights_of_another_precision_are_read_as_they_are(tmp_path):
    assert load_model(str(tiny.save(tmp_path, dtype=torch.bfloat16))).dtype == torch.bfloat16
