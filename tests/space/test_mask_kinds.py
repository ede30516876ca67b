"""Whatever comes in the place of a mask is refused by name, or is one."""

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
GOOD = random_mask(LAYOUT, 3).bits
LAST = GOOD[-1]


def without(row):
    """The bits with another last row."""
    return (*GOOD[:-1], row)


KINDS = {
    "a site less": GOOD[:-1], "a site more": (*GOOD, LAST), "no site": (), "a bit less": without(LAST[:-1]),
    "a bit more": without(np.append(LAST, True)), "no bits": without(LAST[:0]), "two dimensions": without(LAST[None]),
    "a number": without(5), "one bool": without(True), "reals": without(LAST.astype(float)), "twos": without(2 * LAST.astype(int)),
    "ones": without(LAST.astype(int)), "minus ones": without(-LAST.astype(int)), "NaN": without(np.full(12, np.nan)),
    "None": without(None), "Nones": without([None] * 12), "words": without(["True"] * 12), "a text": without("1" * 12),
    "ragged": without([[True], [True, False]]), "all off": without(np.zeros(12, dtype=bool)),
    "half a group": (np.ones(3, dtype=bool), *GOOD[1:]), "another model's": random_mask(layout(layers=3, ffn=9)).bits,
    "complex": without(LAST.astype(complex)), "objects": without([object()] * 12),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_mask_of_this_model_is_refused(kind):
    with refuses(InputError) as caught:
        check_mask(Mask(KINDS[kind]), LAYOUT)
    assert "site" in str(caught.value) or "L0" in str(caught.value)


def test_all_on_is_a_mask_and_lists_of_bools_are_too():
    check_mask(Mask(tuple([True] * int(units) for units in LAYOUT.units)), LAYOUT)
    check_mask(Mask(GOOD), LAYOUT)


@pytest.mark.parametrize("use", [cut, masked, narrowed])
def test_no_wrong_mask_reaches_a_model(use):
    model = tiny.model()
    of, before = layout_of_model(model), tiny.snapshot(model)
    bits = random_mask(of).bits
    for wrong in (bits[:-1], (*bits[:-1], bits[-1][:-1]), (*bits[:-1], np.zeros_like(bits[-1]))):
        with refuses(InputError):
            result = use(model, of, Mask(wrong))
            if use is not cut:
                with result:
                    pytest.fail("the model ran")
    assert tiny.snapshot(model) == before


ROWS = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 3) | st.floats() | st.text(max_size=2) | st.binary(max_size=2),
    lambda inner: st.lists(inner, max_size=13),
    max_leaves=14,
) | st.lists(st.booleans(), min_size=2, max_size=13).map(np.array)


@examples(1000)
@given(st.lists(ROWS | st.just(LAST) | st.just(GOOD[0]), max_size=5).map(tuple))
def test_any_value_is_refused_or_a_mask(bits):
    try:
        mask = Mask(bits)
        check_mask(mask, LAYOUT)
    except PPFError as error:
        assert isinstance(error, InputError) and str(error).count("; ") >= 2 and "\n" not in str(error)
    else:
        assert all(row.dtype == bool and len(row) == units for row, units in zip(mask.bits, LAYOUT.units, strict=True))
        assert torch.from_numpy(mask.bits[0].copy()).dtype == torch.bool
