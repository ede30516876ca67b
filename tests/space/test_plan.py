import json

import numpy as np
import pytest

from builders import layout, random_mask, refuses
from ppf.errors import DamagedError, InputError
from ppf.space.allocation import allocate
from ppf.space.mask import Mask
from ppf.space.plan import is_export, mask_of, read_plan, wish_of

LAYOUT = layout(layers=3)


def packed(mask):
    return [np.packbits(bits).tobytes().hex() for bits in mask.bits]


def export_record(**other):
    mask = random_mask(LAYOUT)
    return {"format": 1, "layout": LAYOUT.fingerprint, "mask": packed(mask), "kept": told(mask), **other}


def told(mask):
    return [{"kept": int(bits.sum())} for bits in mask.bits]


def written(tmp_path, text, name="plan.csv"):
    path = tmp_path / name
    path.write_text(text)
    return path


def test_a_mask_comes_back_as_it_went():
    mask = random_mask(LAYOUT, 5)
    assert mask_of(export_record(mask=packed(mask), kept=told(mask)), LAYOUT).digest == mask.digest


def test_a_record_that_contradicts_its_mask_is_refused():
    good = told(random_mask(LAYOUT))
    for kept in (
        None,
        3,
        [],
        good[:-1],
        [*good, good[0]],
        [None, *good[1:]],
        [{"kept": good[0]["kept"] + 1}, *good[1:]],
        [{"kept": [1, 2]}, *good[1:]],
    ):
        with refuses(DamagedError):
            mask_of(export_record(kept=kept), LAYOUT)


def test_another_model_is_told_in_words():
    record = export_record(layout="f" * 32, model={"type": "qwen3"}, params={"before": 1234567})
    with refuses(DamagedError) as caught:
        mask_of(record, LAYOUT)
    assert "(qwen3, 1,234,567 parameters)" in str(caught.value) and f"{LAYOUT.total:,} parameters" in str(caught.value)


def broken_masks():
    good = packed(random_mask(LAYOUT))
    emptied = packed(Mask(tuple(np.zeros(units, dtype=bool) for units in LAYOUT.units)))
    yield from (None, 7, {}, [], good[:-1], [*good, "ff"], [None, *good[1:]], [good[0] + "00", *good[1:]], [good[1], *good[1:]])
    yield from (["zz", *good[1:]], [" f", *good[1:]], ["FF\n", *good[1:]], emptied)
    yield ["f8", *good[1:]]  # a bit behind the two units of the first site


@pytest.mark.parametrize("mask", list(broken_masks()), ids=str)
def test_a_damaged_mask_is_refused(mask):
    with refuses(DamagedError):
        mask_of(export_record(mask=mask), LAYOUT)


@pytest.mark.parametrize("other", [{"format": 2}, {"format": None}, {"layout": "f" * 32}, {"layout": ["x" * 1000]}])
def test_a_plan_of_something_else_is_refused(other):
    with refuses(DamagedError) as caught:
        mask_of(export_record(**other), LAYOUT)
    assert len(str(caught.value)) < 250


def test_what_is_missing_is_called_nothing():
    for changes in ({"format": None}, {"mask": [None] * len(LAYOUT.sites)}, {"kept": [None] * len(LAYOUT.sites)}):
        with refuses(DamagedError) as caught:
            mask_of(export_record(**changes), LAYOUT)
        assert "nothing" in str(caught.value) and "None" not in str(caught.value)


def test_what_is_an_export():
    assert is_export(export_record()) and not is_export([0.1]) and not is_export({"attn": [], "ffn": []})


@pytest.mark.parametrize(
    "record",
    [
        [0.2, 0.3, 0.4],
        {"attn": [0.2, 0.3, 0.4], "ffn": [0.2, 0.3, 0.4]},
        [{"attn": 0.2, "ffn": 0.2}, {"attn": 0.3, "ffn": 0.3}, {"attn": 0.4, "ffn": 0.4, "more": "x"}],
    ],
    ids=["list", "columns", "rows"],
)
def test_every_form_is_the_same_wish_and_its_mean_is_met(record):
    policy, budget = wish_of(record, LAYOUT)
    assert policy.keep.tolist() == [0.8, 0.8, 0.7, 0.7, 0.6, 0.6]
    gone = LAYOUT.total - LAYOUT.kept_params(allocate(policy, budget, LAYOUT).kept)
    assert 0 <= gone - 0.3 * LAYOUT.prunable < LAYOUT.costs.min()


def test_the_mean_counts_what_each_site_holds():
    policy, budget = wish_of({"attn": [0, 0, 0], "ffn": [0.5, 0.5, 0.5]}, LAYOUT)
    assert budget.remove == LAYOUT.units[1] // 2 * LAYOUT.costs[1] * 3
    assert allocate(policy, budget, LAYOUT).kept.tolist() == [2, 86] * 3


@pytest.mark.parametrize(
    "record",
    [
        [0.1, 0.2], [0.1] * 4, [], None, "0.3", 0.3, {}, {"attn": [0.1] * 3}, {"attn": 1, "ffn": 2}, [1.0, 1.0, 1.0], [30, 30, 30],
        [0.1, 0.2, True], [0.1, 0.2, "x"], [0.1, 0.2, float("nan")], [0.1, 0.2, -0.1], [0.1, 0.2, 10**400], [{"attn": 0.1}] * 3,
        [0.1, {}, 0.2], [[0.1], [0.2], [0.3]],
    ],
    ids=lambda record: str(record)[:30],
)  # fmt: skip
def test_what_are_no_ratios_is_refused(record):
    with refuses(InputError) as caught:
        wish_of(record, LAYOUT)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize(
    "text",
    [
        "0.2\n0.3\n0.4\n", "ratio\n0.2\n0.3\n0.4", "layer,ratio\n0,0.2\n2,0.4\n1,0.3\n", "attn,ffn\n.2,.2\n.3,.3\n.4,.4\n",
        "Layer, FFN, Attn\n1,0.3,0.3\n0,0.2,0.2\n\n2,0.4,0.4\n", "\ufeffattn,ffn\n.2,.2\n.3,.3\n.4,.4\n",
        "attn;ffn\n.2;.2\n.3;.3\n.4;.4\n",
    ],
)  # fmt: skip
def test_csv_is_the_same_wish(tmp_path, text):
    assert wish_of(read_plan(written(tmp_path, text)), LAYOUT)[0].keep.tolist() == [0.8, 0.8, 0.7, 0.7, 0.6, 0.6]


@pytest.mark.parametrize(
    "text",
    ["", "\n\n", "ratio\n", "a,b\n1\n", "0.1,0.2\n0.1,0.2\n", "ratio\nx\n", "layer,ratio\n1,0.2\n2,0.3\n",
     "layer,ratio\n0,0.2\n0,0.3\n", "attn,ffn\n0.1,0.2\n0.1\n", "layer\n0\n1\n"],
)  # fmt: skip
def test_csv_that_holds_no_ratios_is_refused(tmp_path, text):
    with refuses(InputError):
        read_plan(written(tmp_path, text))


def test_files_that_cannot_be_plans_are_refused(tmp_path):
    for name in ("none.json", "."):
        with refuses(InputError):
            read_plan(tmp_path / name)
    for text in ("{", "[" * 100_000, "\x00"):
        with refuses(DamagedError):
            read_plan(written(tmp_path, text, "plan.json"))
    with refuses(DamagedError):
        read_plan(written(tmp_path, 'ratio\n"0.1\n'))
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe\x00")
    with refuses(DamagedError):
        read_plan(tmp_path / "bytes.csv")
    with open(tmp_path / "huge.json", "wb") as file:
        file.truncate(2**30)
    with refuses(InputError):
        read_plan(tmp_path / "huge.json")
    assert read_plan(written(tmp_path, json.dumps([0.1]), "plan.json")) == [0.1]
