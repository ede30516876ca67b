import errno
import math
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

import ppf
import tiny_models as tiny
from builders import full_disk, layout, random_mask, refuses
from ppf.errors import DamagedError, InputError, ResourceError
from ppf.llm.depth import with_depth
from ppf.llm.engines.bench import InProcessEngine
from ppf.llm.engines.local import LocalEngine
from ppf.llm.load import load_model
from ppf.llm.placement import convert
from ppf.llm.text import Text
from ppf.space.mask import Mask

LAYOUT = layout(layers=1, ffn=40)
BLOCKS = tiny.blocks(6, 12)
STAND_IN = """#!{python} -IS
import base64, hashlib, json, os, signal, sys, time
folder = json.loads(sys.stdin.readline())["folder"]
with open(folder + "/pids", "a") as file:
    file.write(str(os.getpid()) + "\\n")
starts = len(open(folder + "/pids").readlines())

def told(what):
    return os.path.exists(folder + "/" + what)

if told("broken"):
    sys.exit("the model is not there")
if told("refused"):
    print(json.dumps({{"error": "InputError", "message": "a; b; c"}}), flush=True)
    sys.exit()
if told("killed at start " + str(starts)):
    os.kill(os.getpid(), signal.SIGKILL)
print("{{}}", flush=True)
for line in sys.stdin:
    data = base64.b64decode(json.loads(line)["mask"])
    name = hashlib.sha256(data).hexdigest()[:32]
    if told("slow " + name):
        time.sleep(0.1)
    if told("deadly " + name) or told("deadly once " + name):
        if told("deadly once " + name):
            os.remove(folder + "/deadly once " + name)
        print("no more memory", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    if told("refused " + name):
        print(json.dumps({{"error": "InputError", "message": "a; b; c"}}), flush=True)
        break
    kl = None if told("nan " + name) else 0.25
    number = sum(bin(byte).count("1") for byte in data)
    print(json.dumps({{"log_ppl": number, "kl": kl, "tokens": 7, "seconds": 0.5, "reason": ""}}), flush=True)
"""


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    """Puts a quick program in the place of real workers; it obeys the files of the folder returned."""
    (tmp_path / "python").write_text(STAND_IN.format(python=sys.executable))
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    return tmp_path


def pool(folder, workers=2):
    return closing(LocalEngine(folder, folder / "text", LAYOUT, "float32", workers, 4096))


def masks(count=12, of=LAYOUT):
    """Masks that differ."""
    found = {mask.digest: mask for mask in (random_mask(of, seed) for seed in range(3 * count))}
    return list(found.values())[:count]


def upper(of):
    """Two masks that leave all layers but the last alone."""
    found = []
    for site in (-2, -1):
        bits = [np.ones(units, dtype=bool) for units in of.units]
        bits[site][1:] = False
        found.append(Mask(tuple(bits)))
    return found


def tell(folder, what, mask=None):
    (folder / (f"{what} {mask.digest}" if mask else what)).touch()


def kept(mask):
    return sum(bits.sum() for bits in mask.bits)


def children():
    """Processes that this one started and that are not gone."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[1] == str(os.getpid()):
            found.append(int(entry.parent.name))
    return found


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# --- a pool of processes ---


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("count", [0, 1, 3, 12])
def test_each_mask_is_answered_once_with_its_own_result(stand_ins, count, workers):
    with pool(stand_ins, workers) as engine:
        found = list(engine.measure(masks(count)))
    assert sorted(index for index, _ in found) == list(range(count))
    assert all(result.log_ppl == kept(masks(count)[index]) for index, result in found)
    assert all((result.kl, result.tokens, result.seconds, result.reason) == (0.25, 7, 0.5, "") for _, result in found)


def test_results_come_as_they_are_ready(stand_ins):
    wanted = masks(6)
    tell(stand_ins, "slow", wanted[0])
    with pool(stand_ins, 2) as engine:
        list(engine.measure(wanted[1:3]))
        order = [index for index, _ in engine.measure(wanted)]
    assert order[-1] == 0 and sorted(order) == list(range(6))


def test_an_engine_measures_again_and_again(stand_ins):
    with pool(stand_ins) as engine:
        for count in (3, 0, 5, 1):
            assert len(list(engine.measure(masks(count)))) == count
    assert len((stand_ins / "pids").read_text().split()) <= 2


def test_numbers_that_are_not_finite_come_through(stand_ins):
    wanted = masks(2)
    tell(stand_ins, "nan", wanted[1])
    with pool(stand_ins) as engine:
        found = dict(engine.measure(wanted))
    assert math.isnan(found[1].kl) and found[1].log_ppl == kept(wanted[1]) and found[0].kl == 0.25


@pytest.mark.parametrize("workers", [1, 3])
def test_a_worker_that_dies_is_replaced_and_its_mask_measured_again(stand_ins, workers):
    wanted = masks()
    for mask in wanted[::3]:
        tell(stand_ins, "deadly once", mask)
    with pool(stand_ins, workers) as engine:
        found = list(engine.measure(wanted))
    assert sorted((index, result.log_ppl) for index, result in found) == [(index, kept(mask)) for index, mask in enumerate(wanted)]
    assert workers + 4 >= len((stand_ins / "pids").read_text().split()) > 4


@pytest.mark.parametrize("workers", [1, 2])
def test_a_mask_that_kills_its_worker_three_times_is_a_failure_with_last_words(stand_ins, workers):
    wanted = masks()
    tell(stand_ins, "deadly", wanted[5])
    with pool(stand_ins, workers) as engine:
        found = dict(engine.measure(wanted))
        assert sorted(found) == list(range(12))
        assert math.isnan(found[5].log_ppl) and math.isnan(found[5].kl)
        assert "3 times" in found[5].reason and "no more memory" in found[5].reason and "-9" in found[5].reason
        assert all(found[index].log_ppl == kept(mask) for index, mask in enumerate(wanted) if index != 5)
        assert dict(engine.measure(wanted[:5])) == {index: found[index] for index in range(5)}


def test_a_worker_killed_while_it_rests_is_replaced(stand_ins):
    before = children()
    with pool(stand_ins, 1) as engine:
        assert len(list(engine.measure(masks(2)))) == 2
        for pid in set(children()) - set(before):
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)
        assert len(list(engine.measure(masks(4)))) == 4


def test_workers_that_are_killed_while_they_start_get_another_chance(stand_ins):
    for start in (1, 2):
        tell(stand_ins, f"killed at start {start}")
    with pool(stand_ins, 1) as engine:
        assert len(list(engine.measure(masks(3)))) == 3
    tell(stand_ins, "killed at start 4")
    tell(stand_ins, "killed at start 5")
    tell(stand_ins, "killed at start 6")
    with pool(stand_ins, 1) as engine, refuses(ResourceError):
        list(engine.measure(masks(3)))


def test_a_worker_that_can_never_start_ends_the_measuring(stand_ins):
    before = children()  # multiprocessing keeps a helper of its own
    tell(stand_ins, "broken")
    with pool(stand_ins, 2) as engine, refuses(ResourceError) as caught:
        list(engine.measure(masks(3)))
    assert "the model is not there" in str(caught.value)
    assert len((stand_ins / "pids").read_text().split()) <= 2 and children() == before


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("of", ["the model", "a mask"])
def test_what_a_worker_refuses_no_other_is_asked(stand_ins, workers, of):
    before, wanted = children(), masks(3)
    tell(stand_ins, "refused", wanted[0] if of == "a mask" else None)
    with pool(stand_ins, workers) as engine, refuses(InputError) as caught:
        list(engine.measure(wanted))
    assert str(caught.value) == "a; b; c" and children() == before
    assert len((stand_ins / "pids").read_text().split()) <= workers


@pytest.mark.parametrize("failing", [1, 3])
def test_processes_that_the_system_does_not_start_are_said_and_the_others_ended(stand_ins, monkeypatch, failing):
    before, start, calls = children(), subprocess.Popen, []

    def limited(*args, **options):
        calls.append(1)
        if len(calls) == failing:
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return start(*args, **options)

    monkeypatch.setattr(subprocess, "Popen", limited)
    with refuses(ResourceError), pool(stand_ins, 4):
        pytest.fail("one is missing")
    assert len(calls) == failing and children() == before


def test_a_worker_that_cannot_be_replaced_ends_the_measuring(stand_ins, monkeypatch):
    before, wanted = children(), masks()
    tell(stand_ins, "deadly", wanted[5])
    with pool(stand_ins, 2) as engine, refuses(ResourceError):
        monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: full_disk())
        list(engine.measure(wanted))
    assert children() == before


@pytest.mark.parametrize("taken", [1, 5])
def test_an_abandoned_run_leaves_nothing_in_the_next(stand_ins, taken):
    wanted = masks()
    for mask in wanted:
        tell(stand_ins, "slow", mask)
    with pool(stand_ins, 2) as engine:
        run = engine.measure(wanted)
        for _ in range(taken):
            next(run)
        run.close()
        found = list(engine.measure(wanted[6:]))
    assert sorted((index, result.log_ppl) for index, result in found) == [
        (index, kept(mask)) for index, mask in enumerate(wanted[6:])
    ]


@pytest.mark.parametrize("moment", ["start", "middle", "end"])
def test_closing_leaves_no_process(stand_ins, moment):
    before = children()
    with pool(stand_ins, 3) as engine:
        assert len(children()) == len(before) + 3
        if moment != "start":
            run = engine.measure(masks())
            next(run)
            if moment == "end":
                list(run)
    assert children() == before


# --- the real workers ---


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_processes_give_the_results_of_this_one_even_if_one_is_killed(real, dtype):
    folder, text, of = real
    wanted, before = [*masks(8, of), *upper(of)], children()
    here = convert(load_model(str(folder)).model, torch.device("cpu"), getattr(torch, dtype))
    engine = InProcessEngine(here, of, Text.load(text, of.fingerprint), 4096)
    expected, some = dict(engine.measure(wanted)), dict(engine.measure(wanted[:2], "test", [2, 0]))
    with closing(LocalEngine(folder, text, of, dtype, 2, 4096)) as engine:
        run = engine.measure(wanted)
        found = dict([next(run)])
        os.kill(next(pid for pid in children() if pid not in before), signal.SIGKILL)
        rest = list(run)
        for index, result in engine.measure(wanted[:2], "test", [2, 0]):
            assert result.losses == pytest.approx(some[index].losses, abs=1e-6)
            assert result.divergences == pytest.approx(some[index].divergences, abs=1e-6)
    assert len(rest) == 9 and sorted({**found, **dict(rest)}) == list(range(10)) and children() == before
    for index, result in {**found, **dict(rest)}.items():
        assert (result.log_ppl, result.kl) == pytest.approx((expected[index].log_ppl, expected[index].kl), abs=1e-6)
        assert (result.tokens, result.reason) == (BLOCKS.size, "") and result.seconds > 0


def test_a_worker_knows_the_floors_of_the_fit(real):
    folder, text, of = real
    model = load_model(str(folder)).model
    deep = with_depth(model, of)
    Text("a", BLOCKS[:1], BLOCKS, BLOCKS[:0], BLOCKS[:3]).save(text, deep.fingerprint)
    gone = [tiny.DEPTH_MASKS[kind](deep) for kind in ("ffn", "layer", "all")]
    expected = dict(InProcessEngine(model, deep, Text.load(text, deep.fingerprint), 4096).measure(gone))
    with closing(LocalEngine(folder, text, deep, "float32", 1, 4096)) as engine:
        for index, result in engine.measure(gone):
            assert result.reason == "" and result.kl == pytest.approx(expected[index].kl, abs=1e-6)


@pytest.mark.slow
def test_a_real_worker_without_a_model_says_so(real):
    folder, text, of = real
    (folder / "model.safetensors").unlink()
    with closing(LocalEngine(folder, text, of, "float32", 1, 4096)) as engine, refuses(DamagedError) as caught:
        list(engine.measure(masks(3, of)))
    assert "model.safetensors" in str(caught.value)


PARENT = """
import sys
from pathlib import Path
from ppf.llm.engines.local import LocalEngine
from ppf.llm.load import load_model
folder, text = map(Path, sys.argv[1:])
engine = LocalEngine(folder, text, load_model(str(folder)).layout, "float32", 2, 4096)
print(*(worker._process.pid for worker in engine.workers), flush=True)
sys.stdin.read()
"""


@pytest.mark.slow
def test_workers_end_when_their_parent_dies(real):
    folder, text, _ = real
    environment = {**os.environ, "PYTHONPATH": str(Path(ppf.__file__).parents[1])}
    command = [sys.executable, "-c", PARENT, str(folder), str(text)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        workers = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(workers) == 2 and all(map(alive, workers))
        parent.kill()
    deadline = time.monotonic() + 60
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, workers))
