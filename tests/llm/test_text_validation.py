import numpy as np
import pytest

import tiny_models as tiny
from ppf.llm.text import TextSizes, load_text

WORDS = 4000


def words(start, stop):
    return " ".join(f"w{index}" for index in range(start, stop))


def dealt(tmp_path, search, validation, seed=0):
    """Blocks of 8 of a stream in which token, place and block are one: 4000 words, of which 1600 are for search."""
    (tmp_path / "a.txt").write_text(words(3, WORDS + 3))
    return load_text(str(tmp_path / "a.txt"), tiny.tokenizer(WORDS), TextSizes(8, 24, search, validation, 32), seed)


@pytest.mark.parametrize(("search", "validation"), [(40, 0), (40, 160), (160, 40), (8, 800), (104, 1000), (3, 80)])
@pytest.mark.parametrize("seed", [0, 7])
def test_the_search_part_is_dealt_out_without_rest_or_overlap(tmp_path, search, validation, seed):
    text, all_taken = (dealt(tmp_path, *sizes, seed=seed) for sizes in ((search, validation), (search + validation, 0)))
    assert len(text.search) == max(1, search // 8)
    both = np.concatenate([text.search, text.validation])
    np.testing.assert_array_equal(both[both[:, 0].argsort()], all_taken.search)
    assert len(all_taken.validation) == 0
    for part in (text.search, text.validation):
        assert part.shape[1] == 8 and (np.diff(part[:, 0]) > 0).all()
    others = set(text.calibration.ravel()) | set(text.test.ravel())
    assert not others & set(both.ravel())


@pytest.mark.parametrize(("search", "validation"), [(40, 160), (160, 40), (104, 1000), (400, 400), (16, 1200)])
def test_both_are_spread_evenly(tmp_path, search, validation):
    text = dealt(tmp_path, search, validation)
    order = np.sort(np.concatenate([text.search[:, 0], text.validation[:, 0]]))
    for part in (text.search, text.validation):
        places = np.searchsorted(order, part[:, 0])
        share = len(order) / len(part)
        assert np.abs(places - (np.arange(len(part)) + 0.5) * share + 0.5).max() <= share / 2 + 1


def test_search_comes_first_where_the_text_is_short(tmp_path):
    whole = dealt(tmp_path, 1600, 1600)
    assert len(whole.search) == 200 and whole.validation.shape == (0, 8)
    short = dealt(tmp_path, 1200, 1600)
    assert len(short.search) == 150 and len(short.validation) == 50
    (tmp_path / "one.txt").write_text(words(3, 33))
    one = load_text(str(tmp_path / "one.txt"), tiny.tokenizer(), TextSizes(6, 6, 12, 600, 12), 0)
    assert len(one.search) == 2 and one.validation.shape == (0, 6)


def test_what_the_search_sees_alone_does_not_change_the_other_parts(tmp_path):
    with_it, without = dealt(tmp_path, 40, 160), dealt(tmp_path, 40, 0)
    np.testing.assert_array_equal(with_it.calibration, without.calibration)
    np.testing.assert_array_equal(with_it.test, without.test)
    assert with_it.digest != without.digest


def test_a_sampled_text_has_both(tmp_path):
    sizes = TextSizes(8, 24, 40, 80, 32)
    text = load_text("self", tiny.tokenizer(), sizes, 0, model=tiny.model())
    assert text.search.shape == (5, 8) and text.validation.shape == (10, 8)
    assert len({row.tobytes() for row in [*text.search, *text.validation]}) == 15
