import re
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from builders import LAYOUTS, examples, layout, refuses
from ppf.errors import InputError
from ppf.space.budget import Budget, aligned_floors, parse_count, parse_size, unit_steps

NAMES = st.sampled_from(sorted(LAYOUTS))


def most(of, align=1):
    return int((of.units - aligned_floors(of, align)) @ of.costs)


@examples(100)
@given(NAMES, st.floats(0, 0.85))
def test_a_ratio_removes_its_share_and_less_than_one_parameter_more(name, ratio):
    of = LAYOUTS[name]
    wanted = Fraction(ratio) * of.prunable
    remove = Budget.from_ratio(ratio, of).remove
    assert wanted - Fraction(1, 10**5) <= remove < wanted + 1


@examples(100)
@given(NAMES, st.floats(0, 1))
def test_the_ratio_of_a_budget_gives_the_budget_back(name, share):
    of = LAYOUTS[name]
    budget = Budget(int(share * most(of)))
    assert Budget.from_ratio(budget.ratio(of), of) == budget


@pytest.mark.parametrize("ratio", [0, 0.3, np.float32(0.25), np.float64(0.25)])
def test_any_real_number_is_a_ratio(ratio):
    assert Budget.from_ratio(ratio, layout()).ratio(layout()) == pytest.approx(float(ratio), abs=1e-4)


@pytest.mark.parametrize("ratio", [-0.1, -1e-9, 1, 1.0, 1.5, 30, float("nan"), float("inf"), "0.3\n", None, True, [0.3], 1j])
def test_what_is_no_ratio_is_refused(ratio):
    with refuses(InputError):
        Budget.from_ratio(ratio, layout())


@pytest.mark.parametrize("align", [1, 32, 64])
def test_a_ratio_beyond_the_floors_is_refused_with_the_largest_that_works(align):
    of = layout()
    with refuses(InputError) as caught:
        Budget.from_ratio(0.99, of, align)
    reach = float(re.search(r"at most ratio ([0-9.]+)", str(caught.value))[1])
    assert Budget.from_ratio(reach, of, align).remove <= most(of, align)
    with refuses(InputError):
        Budget.from_ratio(reach + 2e-4, of, align)


@examples(50)
@given(NAMES, st.floats(0, 1.2))
def test_a_number_of_parameters_is_what_stays(name, share):
    of = LAYOUTS[name]
    params = of.total - int((1 - share) * most(of))
    assert of.total - Budget.from_params(params, of).remove == min(params, of.total)


@examples(50)
@given(NAMES, st.floats(0, 1), st.sampled_from([4, 2, 1, 0.5625, 0.5]))
def test_a_memory_size_holds_the_weights(name, share, bytes_per_param):
    of = LAYOUTS[name]
    size = int((of.total - share * most(of)) * bytes_per_param) + 1
    stays = of.total - Budget.from_memory(size, of, bytes_per_param).remove
    assert stays * bytes_per_param <= size < (stays + 1) * bytes_per_param + 1


def test_a_refusal_names_the_steps_and_the_size_that_was_asked():
    of = layout()
    with refuses(InputError) as caught:
        Budget.from_memory(1000, of, 2, align=64, tp=2, headers=50_000)
    assert "with --align 64 and --tp 2 (" in str(caught.value) and "; 1,000 bytes, that is ratio " in str(caught.value)
    with refuses(InputError) as caught:
        Budget.from_memory(1000, of, 2)
    assert "--" not in str(caught.value)


@examples(20)
@given(NAMES, st.integers(0, 5000))
def test_headers_count_as_bytes(name, headers):
    of = LAYOUTS[name]
    size = 2 * of.total - most(of)
    assert Budget.from_memory(size + headers, of, 2, headers=headers) == Budget.from_memory(size, of, 2)


@pytest.mark.parametrize("grid", [(2**24 + 1, 1), (10**30, 1), (1, 10**30)])
def test_steps_beyond_any_model_are_refused(grid):
    with refuses(InputError):
        Budget.from_ratio(0.1, layout(), *grid)


def test_more_than_the_model_has_removes_nothing():
    of = layout()
    assert Budget.from_params(of.total + 1, of) == Budget.from_memory(of.total * 2, of, 2) == Budget(0)


def test_less_than_the_floors_leave_is_refused():
    of = layout()
    smallest = of.total - most(of)
    assert Budget.from_params(smallest, of).remove == most(of)
    for wish in (lambda: Budget.from_params(smallest - 1, of), lambda: Budget.from_memory(smallest * 2 - 1, of, 2)):
        with refuses(InputError):
            wish()


@examples(50)
@given(st.integers(1, 500), st.sampled_from([1, 2, 32, 64, 128, 256]))
def test_floors_are_raised_to_the_alignment_but_never_above_the_units(ffn, align):
    of = layout(ffn=ffn)
    floors, steps = aligned_floors(of, align), unit_steps(of, align)
    assert steps.tolist() == [1, align] * of.layers
    assert (floors >= of.floors).all() and (floors <= of.units).all()
    assert ((floors % steps == 0) | (floors == of.units)).all()


@pytest.mark.parametrize("align", [0, -1, 1.5, True, "32", None])
def test_what_is_no_alignment_is_refused(align):
    with refuses(InputError):
        unit_steps(layout(), align)
    with refuses(InputError):
        Budget.from_ratio(0.3, layout(), align)


@pytest.mark.parametrize(
    ("text", "count"), [("2000000", 2 * 10**6), ("3M", 3 * 10**6), (" 1.5b ", 15 * 10**8), ("1.5 G", 15 * 10**8), ("7k", 7000)]
)
def test_numbers_of_parameters(text, count):
    assert parse_count(text) == count


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1000000B", 10**6),
        ("8GB", 8 * 10**9),
        ("500MiB", 500 * 2**20),
        ("1.5gib", 3 * 2**29),
        ("2 kB", 2000),
        ("3MB", 3 * 10**6),
        ("4KiB", 4096),
        ("1.5TB", 15 * 10**11),
        ("2TiB", 2**41),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@examples(200)
@given(st.integers(1, 10**7), st.sampled_from(["K", "M", "B"]))
@example(1001, "K")
def test_a_decimal_fraction_is_read_exactly(thousandths, unit):
    text = f"{thousandths // 1000}.{thousandths % 1000:03d}{unit}"
    assert parse_count(text) == thousandths * {"K": 1, "M": 10**3, "B": 10**6}[unit]


@pytest.mark.parametrize("parse", [parse_count, parse_size])
@pytest.mark.parametrize("text", ["", "M", "0", "0B", "-3M", "3X", "1e6", "nan", "3,000", "٣M", "1.2.3", "5\n6", "1" * 400, "3MBB"])
def test_what_is_no_amount_is_refused(parse, text):
    with refuses(InputError):
        parse(text)


@pytest.mark.parametrize(("parse", "text"), [(parse_count, "0.4"), (parse_size, "0.4B")])
def test_less_than_one_is_refused(parse, text):
    with refuses(InputError):
        parse(text)


@pytest.mark.parametrize(("parse", "text"), [(parse_count, "3MB"), (parse_size, "1000")])
def test_units_of_the_other_kind_are_refused(parse, text):
    with refuses(InputError):
        parse(text)
