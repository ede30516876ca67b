"""What do damage, errors and hostile files do? The campaigns of the tests at their full counts, and what came of each.

Kills of fits and of writers have a script of their own, kills.py.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import errno
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from record import HERE, write

sys.path.insert(0, str(HERE.parent / "tests"))  # the campaigns are theirs

import fuzzing
import test_fuzz_atheris as guided
import test_salvage as stores
import test_system_calls as calls
import tiny_models
from llm import test_gguf_structure as gguf_kinds
from llm import test_load_damage as configs
from llm import test_load_hostile as hostile
from llm.test_perplexity import coverage
from ppf.artifact import load_artifact, save_artifact
from ppf.errors import PPFError
from ppf.llm.gguf_structure import check_structure
from ppf.llm.load import load_model
from ppf.salvage import salvage
from ppf.samples import SampleStore
from ppf.space.mask import Mask, check_mask
from space import test_mask_kinds as masks

ERRORS = ("ENOSPC", "EIO", "EROFS", "EDQUOT", "EACCES")


def outcome(read: Callable[[], Any]) -> str:
    """``"read"``, ``"refused"`` in one line, or ``"foreign"``."""
    try:
        read()
    except PPFError as error:
        return "refused" if str(error).isprintable() and str(error).count("; ") >= 2 else "foreign"
    except Exception:
        return "foreign"
    return "read"


def kills_and_errors(folder: Path) -> dict[str, Any]:
    """A kill, and every error once and lasting, at every system call that writes."""
    place = folder / "place"
    place.mkdir()
    assert calls.run(place, "old").returncode == 0
    kills, errors = Counter[str](), Counter[str]()
    for call, number, here in _points(place, folder / "kills"):
        killed = calls.run(here, "new", "-e", f"inject={call}:signal=KILL:when={number}")
        kills["points"] += 1
        kills["broken"] += killed.returncode == 0 or _is_broken(here)
        assert calls.run(here, "new").returncode == 0  # the next run
        kills["left_behind"] += bool(calls.workplaces(here))
    for error in ERRORS:
        for lasting in ("", "+"):
            for call, number, here in _points(place, folder / f"{error}{lasting}"):
                done = calls.run(here, "new", "-e", f"inject={call}:error={error}:when={number}{lasting}")
                whole, mute = not _is_broken(here), bool(lasting) and call == "write"
                errors["injected"] += 1
                errors["broken"] += not whole
                errors["refused"] += done.returncode != 0
                errors["silent"] += done.returncode == 0 and whole and calls.what_is_in(here) != ("new", "new")
                named = os.strerror(getattr(errno, error)) in done.stderr and "Traceback" not in done.stderr
                errors["unnamed"] += done.returncode != 0 and not named and not mute
    return {"kills_at_calls": kills, "errors_at_calls": errors}


def _points(place: Path, at: Path) -> Iterator[tuple[str, int, Path]]:
    at.mkdir()
    yield from calls.points(Path(shutil.copytree(place, at / "place")))
    shutil.rmtree(at)


def _is_broken(place: Path) -> bool:
    try:
        calls.what_is_in(place)
    except (AssertionError, OSError, PPFError):
        return True
    return False


def damaged_stores(folder: Path, seed: int) -> dict[str, Any]:
    """Flips, cuts and zeroed pages of a store: what SQLite reads of it, what a repair keeps, and whether a row came out altered."""
    samples, path, damaged = list({one.digest: one for one in stores.some(400)}.values()), folder / "s", folder / "d"
    stores.stored(path, samples)
    counts: dict[str, Counter[str]] = {}
    for kind, data in stores.damages(path.read_bytes(), random.Random(seed)):
        damaged.write_bytes(data)
        kept, readable = set(salvage([damaged])), stores.readable(damaged)
        of = counts.setdefault(kind, Counter())
        of["cases"] += 1
        of["altered"] += bool(kept - set(samples))
        of["missed"] += len(readable - kept)
        of["rows"] += len(samples)
        of["kept"] += len(kept)
        of["kept_by_sqlite"] += len(readable)

        def used() -> None:
            with closing(SampleStore(damaged, "c")) as store:
                assert set(store.all()) | set(store.failed()) <= set(samples)

        of[outcome(used)] += 1
    return counts


def damaged_artefacts(folder: Path, seed: int) -> dict[str, Any]:
    """Every beginning of an artefact, and flips of a bit."""
    path, rng, counts = folder / "a", random.Random(seed), Counter[str]()
    save_artifact(path, "thing", "f", {"x": fuzzing.np.arange(40.0)}, seed=3)
    data = path.read_bytes()
    flips = [(place := rng.randrange(len(data)), data[place] ^ 1 << rng.randrange(8)) for _ in range(1000)]
    for mutant in [data[:cut] for cut in range(len(data))] + [data[:at] + bytes([byte]) + data[at + 1 :] for at, byte in flips]:
        path.write_bytes(mutant)
        counts[outcome(lambda: load_artifact(path, "thing", "f"))] += 1
    return {"beginnings": len(data), "flips": len(flips), **counts}


def hostile_files(folder: Path) -> dict[str, Any]:
    """Configs, GGUF files and masks of the tests, each of which must be refused; and how long the slowest config took."""
    whole, slowest, found = tiny_models.save(folder / "whole"), 0.0, Counter[str]()
    wanted = [json.dumps(json.loads((whole / "config.json").read_text()) | change).encode() for change in
              [*configs.HOSTILE, *hostile.HOSTILE.values()]]  # fmt: skip
    for number, config in enumerate([*wanted, *hostile.TEXTS.values()]):
        model = Path(shutil.copytree(whole, folder / f"m{number}"))
        (model / "config.json").write_bytes(config)
        start = time.perf_counter()
        found[outcome(partial(load_model, str(model)))] += 1
        slowest = max(slowest, time.perf_counter() - start)
    files, wrong = Counter[str](), Counter[str]()
    for data in gguf_kinds.BAD.values():
        (folder / "f").write_bytes(data)
        files[outcome(lambda: check_structure(folder / "f"))] += 1
    for bits in masks.KINDS.values():
        wrong[outcome(partial(check_mask, Mask(bits), masks.LAYOUT))] += 1
    return {"configs": {**found, "slowest_seconds": round(slowest, 3)}, "gguf": files, "masks": wrong}


def guided_by_coverage(folder: Path, seconds: int) -> dict[str, Any]:
    """Atheris on each reader that is written in Python: inputs tried, and how libFuzzer ended."""
    found = {}
    for reader in guided.READERS:
        (folder / reader).mkdir(parents=True)
        code, runs, _ = guided.fuzz(reader, seconds, folder / reader)
        found[reader] = {"seconds": seconds, "runs": runs, "code": code}
    return found


def intervals(repeats: int) -> dict[str, Any]:
    """How often a 95 % interval holds the truth: of one model, and of a pruned one against the dense one on the same blocks."""
    return {"repeats": repeats, "alone": coverage(repeats, paired=False)[0], "paired": coverage(repeats, paired=True)[0]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=20_000, help="damaged files for each reader")
    parser.add_argument("--seconds", type=int, default=guided.SECONDS, help="of Atheris on each reader; needs ppf[fuzz]")
    arguments = parser.parse_args()
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        places = [Path(temporary) / name for name in ("calls", "stores", "artefacts", "hostile")]
        for place in places:
            place.mkdir()
        result |= {"fuzz": fuzzing.all_campaigns(arguments.cases, arguments.seed)}
        result |= {"stores": damaged_stores(places[1], arguments.seed)}
        result |= {"artefacts": damaged_artefacts(places[2], arguments.seed), "hostile": hostile_files(places[3])}
        result |= kills_and_errors(places[0])
        result |= {"guided": guided_by_coverage(Path(temporary) / "guided", arguments.seconds), "intervals": intervals(1000)}
    write("faults", arguments.seed, result)
