"""Whatever comes in the place of a mask is refused by name, or is one."""

import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiny_models as tiny
from builders import examples, layout, random_mask, refuses
from ppf.errors import InputError, PPFError
from ppf.llm.architectures import layout_of_model
from ppf.llm.masking import masked, narrowed
from ppf.llm.surgery import cut
from ppf.space.mask import Mask, check_mask

LAYOUT = layout(layers=2, ffn=12)


def kinds(of):
    """What is no mask of a layout whose first site is attention and whose last is an FFN, by name."""
    good = random_mask(of, 3).bits
    last, first = good[-1], good[0]
    count = len(last)

    def without(row):
        return (*good[:-1], row)

    return {
        "a site less": good[:-1], "a site more": (*good, last), "no site": (), "a bit less": without(last[:-1]),
        "a bit more": without(np.append(last, True)), "no bits": without(last[:0]), "two dimensions": without(last[None]),
        "a number": without(5), "one bool": without(True), "reals": without(last.astype(float)),
        "twos": without(2 * last.astype(int)), "ones": without(last.astype(int)),
        "minus ones": without(-last.astype(int)), "NaN": without(np.full(count, np.nan)),
        "None": without(None), "Nones": without([None] * count), "words": without(["True"] * count), "a text": without("1" * count),
        "ragged": without([[True], [True, False]]), "all off": without(np.zeros(count, dtype=bool)),
        "half a group": (np.ones(len(first) + 1, dtype=bool), *good[1:]),
        "another model's": random_mask(layout(layers=3, ffn=9)).bits,
        "complex": without(last.astype(complex)), "objects": without([object()] * count),
    }  # fmt: skip


KINDS = kinds(LAYOUT)
GOOD = random_mask(LAYOUT, 3).bits
LAST = GOOD[-1]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_mask_of_this_model_is_refused(kind):
    with refuses(InputError) as caught:
        check_mask(Mask(KINDS[kind]), LAYOUT)
    assert "site" in str(caught.value) or "L0" in str(caught.value)


def test_all_on_is_a_mask_and_lists_of_bools_are_too():
    check_mask(Mask(tuple([True] * int(units) for units in LAYOUT.units)), LAYOUT)
    check_mask(Mask(GOOD), LAYOUT)


@pytest.mark.parametrize("use", [cut, masked, narrowed])
def test_no_wrong_mask_reaches_a_model_and_each_is_refused_at_once(use):
    model = tiny.model()
    of, before = layout_of_model(model), tiny.snapshot(model)
    for kind, wrong in kinds(of).items():
        start = time.process_time()
        with refuses(InputError):
            result = use(model, of, Mask(wrong))
            if use is not cut:
                with result:
                    pytest.fail("the model ran")
        assert time.process_time() - start < 0.05, kind
    assert tiny.snapshot(model) == before


ROWS = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 3) | st.floats() | st.text(max_size=2) | st.binary(max_size=2),
    lambda inner: st.lists(inner, max_size=13),
    max_leaves=14,
) | st.lists(st.booleans(), min_size=2, max_size=13).map(np.array)


ANY = st.lists(ROWS | st.just(LAST) | st.just(GOOD[0]), max_size=5).map(tuple)


def check_any(bits):
    try:
        mask = Mask(bits)
        check_mask(mask, LAYOUT)
    except PPFError as error:
        assert isinstance(error, InputError) and str(error).count("; ") >= 2 and "\n" not in str(error)
    else:
        assert all(row.dtype == bool and len(row) == units for row, units in zip(mask.bits, LAYOUT.units, strict=True))
        assert torch.from_numpy(mask.bits[0].copy()).dtype == torch.bool


@examples(1000)
@given(ANY)
def test_any_value_is_refused_or_a_mask(bits):
    check_any(bits)


@pytest.mark.slow
@examples(5000)
@given(ANY)
def test_any_of_more_values_is_refused_or_a_mask(bits):
    check_any(bits)
