import pytest
import torch

from builders import refuses
from ppf.errors import InputError
from ppf.llm.placement import Placement
from ppf.recipes import choices
from ppf.recipes.choices import (
    TOKENS_PER_BATCH,
    choose_device,
    choose_dtype,
    choose_placement,
    choose_seq_len,
    choose_whole,
    choose_workers,
    tokens_per_batch,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("name", ["abacus", "cuda:99", "meta", "cpu:"])
def test_a_device_that_is_not_here_is_refused(name):
    with refuses(InputError):
        choose_device(name)


def test_auto_is_a_device_that_batches_are_known_for():
    assert tokens_per_batch(choose_device("auto")) in TOKENS_PER_BATCH.values() and choose_device("cpu") == CPU


@pytest.mark.parametrize(
    ("name", "device", "expected"),
    [("auto", CPU, torch.float32), ("auto", CUDA, torch.float16), ("bfloat16", CPU, torch.bfloat16)],
)
def test_the_precision_is_asked_for_or_suits_the_device(name, device, expected):
    assert choose_dtype(name, device, torch.float16) == expected


@pytest.mark.parametrize(("asked", "context", "expected"), [(None, 512, 256), (None, 8, 8), (None, 10**6, 2048), (64, 64, 64)])
def test_a_block_is_asked_for_or_half_the_context(asked, context, expected):
    assert choose_seq_len(asked, context) == expected


def test_a_block_beyond_the_context_is_refused():
    with refuses(InputError):
        choose_seq_len(65, 64)


def test_workers_are_at_least_one_however_large_the_model():
    assert choose_workers(3, 1) == 3 and choose_workers(None, 10**15) == 1 <= choose_workers(None, 1)


def test_a_device_alone_takes_a_whole_model():
    assert choose_placement("cpu") == Placement(CPU) == choose_whole("cpu", "tasks")


def test_limits_are_in_the_order_in_which_devices_are_filled(monkeypatch):
    assert choose_placement("cpu=8GiB") == Placement(CPU, (("cpu", 2**33),))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gpu: ((gpu + 1) * 1000, 10**6))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda gpu: 300)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda gpu: 300 if gpu else 200)  # the rest torch has and does not use
    monkeypatch.setattr(choices, "choose_device", torch.device)
    assert choose_placement("2=1GB, 0=500MB") == Placement(torch.device("cuda:2"), ((2, 10**9), (0, 5 * 10**8)))
    assert choose_placement("split") == Placement(torch.device("cuda:0"), ((0, 880), (1, 1600), (2, 2400)))


@pytest.mark.parametrize(
    "name", ["split", "7=1GB", "cpu=", "cpu=lots", "=1GB", "cpu=1GB,cpu=2GB", "cpu=1GB,0=1GB", "mps=1GB", "cpu=1GB,"]
)
def test_limits_that_cannot_be_kept_are_refused(name):
    with refuses(InputError):
        choose_placement(name)


def test_what_needs_a_whole_model_takes_one_device():
    with refuses(InputError) as caught:
        choose_whole("cpu=1GB", "a live model")
    assert "a live model" in str(caught.value)
