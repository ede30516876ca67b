"""Damages the files that each reader reads, at random but the same in every run, and counts what comes of it.

python tests/fuzzing.py CASES [SEED]
"""

import json
import os
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import tiny_models
from builders import layout, random_mask
from ppf.artifact import load_artifact, save_artifact
from ppf.errors import PPFError
from ppf.llm.architectures import skeleton
from ppf.llm.gguf_structure import check_structure
from ppf.llm.load import read_config
from ppf.llm.text import whole_text
from ppf.llm.weights import check_weights
from ppf.salvage import salvage
from ppf.samples import Measurement, Sample, SampleStore
from ppf.space.mask import Mask
from ppf.space.plan import is_export, mask_of, read_plan, wish_of
from ppf.space.policy import Policy
from ppf.study import StudyFolder

LAYOUT = layout(layers=2, ffn=40)
SLOW = 1.0
"""Seconds that no reader may take for a small file."""
_WORDS = (
    b"null", b"true", b"-1", b"0", b"1e999", b"NaN", b"1e-400", b"[]", b"{}", b'""', b'"\\ud800"', b"9" * 400, b"[" * 2000, b"\xff",
    b"\0", b"\n", b'"a":', b",", b"2147483648", b"18446744073709551616", b"0.30000000000000004",
)  # fmt: skip


@dataclass(frozen=True)
class Target:
    """A reader and a file that it reads.

    Attributes:
        path: The file.
        read: Reads it, and gives what it found.
        sealed: Whether a checksum guards the content, so that what is read must be what was written.
    """

    path: Path
    read: Callable[[], Any]
    sealed: bool = False


def mutants(data: bytes, rng: random.Random) -> Iterator[bytes]:
    """Flipped bits, other bytes, cuts, pieces left out or written twice, and words that are hostile in JSON."""
    while True:
        mutant = bytearray(data)
        for _ in range(rng.choice((1, 1, 2, 4))):
            place, other = rng.randrange(len(mutant) + 1), rng.randrange(len(mutant) + 1)
            match rng.randrange(6):
                case 0 if place < len(mutant):
                    mutant[place] ^= 1 << rng.randrange(8)
                case 1 if place < len(mutant):
                    mutant[place] = rng.randrange(256)
                case 2:
                    del mutant[place:]
                case 3:
                    del mutant[place : place + rng.randrange(40)]
                case 4:
                    mutant[other:other] = mutant[place : place + rng.randrange(200)]
                case _:
                    mutant[place : place + rng.randrange(6)] = rng.choice(_WORDS)
        yield bytes(mutant)


def campaign(target: Target, cases: int, seed: int) -> dict[str, Any]:
    """Counts of ``cases`` damaged files: read as before, read otherwise, refused, foreign errors, slow ones; and the slowest."""
    whole, rng = target.path.read_bytes(), random.Random(seed)
    right, counts, slowest = target.read(), Counter[str](), 0.0
    foreign = set[str]()
    for _, mutant in zip(range(cases), mutants(whole, rng), strict=False):
        target.path.write_bytes(mutant)
        start = time.perf_counter()
        try:
            found = target.read()
            counts["as_before" if repr(found) == repr(right) else "silent" if target.sealed else "other"] += 1
        except PPFError as error:
            counts["refused" if str(error).isprintable() and str(error).count("; ") >= 2 else "foreign"] += 1
        except Exception as error:  # what must not be
            counts["foreign"] += 1
            foreign.add(f"{type(error).__name__}: {error}"[:120])
        seconds = time.perf_counter() - start
        slowest = max(slowest, seconds)
        counts["slow"] += seconds > SLOW
    target.path.write_bytes(whole)
    names = ("as_before", "other", "refused", "silent", "foreign", "slow")
    return {
        "cases": cases,
        **{name: counts[name] for name in names},
        "slowest_seconds": round(slowest, 3),
        "errors": sorted(foreign),
    }


def targets(folder: Path) -> dict[str, Target]:
    """Every reader of files that come from elsewhere or lay on a disk."""
    return {**_study_files(folder), **_model_files(folder / "model"), **_user_files(folder)}


def _study_files(folder: Path) -> dict[str, Target]:
    artefact, store = folder / "artefact", folder / "samples"
    save_artifact(artefact, "thing", "f", {"x": np.arange(40.0), "y": np.arange(5)}, seed=3, note="text")
    record = {
        "model": {"name": "m", "digest": "d", "bytes_per_param": 2}, "layout": LAYOUT.to_json(), "settings": {"text": "pydocs"},
        "dense": {"search": {"log_ppl": 2.5}, "test": {"log_ppl": 2.25}}, "context": "c", "seq_len": 16, "dtype": "float32",
    }  # fmt: skip
    study = StudyFolder.create(folder, record)
    study.keep_plan("probes", [["probe", 0.3, [1, 2, 3]]])
    with closing(SampleStore(store, "c", write=True)) as opened:
        for seed in range(12):
            opened.add(Sample.of(random_mask(LAYOUT, seed), "c", "probe", 0.3, 0, Measurement(2.5, 0.1 * seed, 9, 0.5)))
        known = set(opened.all())

    def known_rows(samples: list[Sample]) -> bool:
        return set(samples) <= known

    def stored() -> bool:
        for rest in ("-wal", "-shm"):
            Path(f"{store}{rest}").unlink(missing_ok=True)
        with closing(SampleStore(store, "c")) as opened:
            return known_rows(opened.all())

    def opened_study() -> Any:
        found = StudyFolder(folder)
        return json.dumps(
            found.record, sort_keys=True
        ), found.layout  # a key that is there twice with one value changes the order alone

    return {
        "artefact": Target(artefact, lambda: load_artifact(artefact, "thing", "f"), sealed=True),
        "study record": Target(folder / "study.json", opened_study, sealed=True),
        "plans of a study": Target(folder / "plans.json", lambda: StudyFolder(folder).plan("probes"), sealed=True),
        "sample store": Target(store, stored, sealed=True),
        "salvage": Target(store, lambda: known_rows(salvage([store])), sealed=True),
    }


def _model_files(folder: Path) -> dict[str, Target]:
    from gguf import GGUFWriter

    tiny_models.save(folder)
    shell, gguf = skeleton(read_config(folder)), folder / "a.gguf"
    writer = GGUFWriter(gguf, "llama")
    writer.add_string("general.name", "tiny")
    writer.add_array("tokens", ["a", "bc", ""])
    writer.add_tensor("a.weight", np.arange(64, dtype=np.float32).reshape(2, 32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {
        "config": Target(folder / "config.json", lambda: skeleton(read_config(folder)) and None),
        "weights": Target(folder / "model.safetensors", lambda: check_weights(folder, shell)),
        "GGUF": Target(gguf, lambda: check_structure(gguf)),
    }


def _user_files(folder: Path) -> dict[str, Target]:
    mask, tokenizer = random_mask(LAYOUT), tiny_models.tokenizer()
    record = {
        "format": 1, "layout": LAYOUT.fingerprint, "mask": [np.packbits(bits).tobytes().hex() for bits in mask.bits],
        "kept": [{"kept": int(bits.sum())} for bits in mask.bits], "policy": Policy.uniform(LAYOUT).to_json(),
    }  # fmt: skip
    places = {name: folder / name for name in ("plan.json", "ratios.json", "ratios.csv", "policy.json", "mask", "t.jsonl", "t.txt")}
    places["plan.json"].write_text(json.dumps(record))
    places["ratios.json"].write_text(json.dumps([{"attn": 0.2, "ffn": 0.3}] * 2))
    places["ratios.csv"].write_text("layer,attn,ffn\n0,0.2,0.3\n1,0.1,0.4\n")
    places["policy.json"].write_text(json.dumps(record["policy"]))
    places["mask"].write_bytes(mask.pack())
    places["t.jsonl"].write_text('{"text": "w3 w4"}\n{"text": "w5", "more": [1, 2]}\n')
    places["t.txt"].write_text("w3 w4 w5 w6 caf\u00e9 w7\n" * 4)

    def plan(path: Path) -> Any:
        found = read_plan(path)
        return mask_of(found, LAYOUT).digest if is_export(found) else wish_of(found, LAYOUT)[1]

    reads: dict[str, Callable[[Path], Any]] = {
        "plan.json": plan, "ratios.json": plan, "ratios.csv": plan,
        "policy.json": lambda path: Policy.from_json(read_plan(path)).keep,
        "mask": lambda path: Mask.unpack(path.read_bytes(), LAYOUT).digest,
        "t.jsonl": lambda path: whole_text(str(path), tokenizer), "t.txt": lambda path: whole_text(str(path), tokenizer),
    }  # fmt: skip
    return {name: Target(path, lambda path=path, read=reads[name]: read(path)) for name, path in places.items()}


def all_campaigns(cases: int, seed: int) -> dict[str, Any]:
    """``campaign`` of every reader, and the most memory that the process had."""
    with tempfile.TemporaryDirectory() as temporary:
        found = {name: campaign(target, cases, seed) for name, target in targets(Path(temporary)).items()}
    return {"readers": found, "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    print(json.dumps(all_campaigns(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0), indent=1))
