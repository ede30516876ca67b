import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import LAYOUTS, examples, importance, layout, random_mask, refuses
from ppf.errors import DamagedError
from ppf.space.allocation import Allocation
from ppf.space.mask import Mask, mask_matrices, select

SEEDS = st.integers(0, 2**32 - 1)
LAYOUT = layout(layers=3, ffn=45)


def bits_of(mask):
    return [site.tolist() for site in mask.bits]


@examples(50)
@given(SEEDS)
def test_select_keeps_the_most_important_units(seed):
    rng = np.random.default_rng(seed)
    kept, scores = rng.integers(0, LAYOUT.units + 1), importance(LAYOUT, seed)
    mask = select(Allocation(kept), scores, LAYOUT)
    np.testing.assert_array_equal(mask.allocation.kept, kept)
    for bits, score in zip(mask.bits, scores.scores, strict=True):
        assert bits.all() or not bits.any() or score[bits].min() >= score[~bits].max()


@examples(50)
@given(SEEDS)
def test_a_smaller_allocation_is_a_subset(seed):
    rng = np.random.default_rng(seed)
    large = rng.integers(LAYOUT.floors, LAYOUT.units + 1)
    small = rng.integers(LAYOUT.floors, large + 1)
    inner, outer = (select(Allocation(kept), importance(LAYOUT, seed), LAYOUT) for kept in (small, large))
    assert all((inside <= outside).all() for inside, outside in zip(inner.bits, outer.bits, strict=True))


def test_the_importance_of_another_model_is_refused():
    with refuses(DamagedError):
        select(Allocation(LAYOUT.floors), importance(layout()), LAYOUT)


def test_a_mask_owns_read_only_bits():
    given_bits = np.array([True, False])
    mask = Mask((given_bits,))
    given_bits[1] = True
    assert bits_of(mask) == [[True, False]]
    with pytest.raises(ValueError, match="read-only"):
        mask.bits[0][0] = False


@examples(50)
@given(SEEDS)
def test_unpack_is_the_inverse_of_pack(seed):
    rng = np.random.default_rng(seed)
    of = layout(*rng.integers(1, 4, 1), ffn=int(rng.integers(1, 40)))
    mask = Mask(tuple(rng.random(units) < 0.5 for units in of.units))
    again = Mask.unpack(mask.pack(), of)
    assert bits_of(again) == bits_of(mask)
    assert again.pack() == mask.pack() and again.digest == mask.digest
    assert len(mask.pack()) == -(-of.units.sum() // 8)


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"\0", lambda data: b""])
def test_bytes_of_another_model_are_refused(change):
    with refuses(DamagedError):
        Mask.unpack(change(random_mask(LAYOUT).pack()), LAYOUT)


def test_every_bit_changes_the_digest():
    mask = random_mask(LAYOUT)
    digests = {mask.digest}
    for index, site in enumerate(mask.bits):
        for unit in range(len(site)):
            other = [bits.copy() for bits in mask.bits]
            other[index][unit] ^= True
            digests.add(Mask(tuple(other)).digest)
    assert len(digests) == 1 + LAYOUT.units.sum()


def picture(mask, scores, width):
    """Units of each site from most to least important, pooled into columns."""
    rows = []
    for bits, order in zip(mask.bits, scores.order, strict=True):
        edges = np.concatenate([[0.0], np.cumsum(bits[order])])
        at = np.interp(np.linspace(0, len(bits), width + 1), np.arange(len(bits) + 1), edges)
        rows.append(np.diff(at) * width / len(bits))
    return np.array(rows)


@examples(50)
@given(SEEDS, st.integers(1, 300))
def test_a_matrix_is_the_picture_of_the_selected_mask(seed, width):
    mask, scores = random_mask(LAYOUT, seed), importance(LAYOUT, seed)
    matrix = mask_matrices(mask.allocation.kept, LAYOUT.units, width)
    np.testing.assert_allclose(matrix, picture(mask, scores, width), atol=1e-9)


def test_matrices_of_a_batch_are_monotone_and_count_the_kept():
    of = LAYOUTS["llama-3-8b"]
    kept = np.random.default_rng(0).integers(of.floors, of.units + 1, (5, len(of.sites)))
    matrices = mask_matrices(kept, of.units, 48)
    assert matrices.shape == (5, len(of.sites), 48)
    assert (np.diff(matrices, axis=-1) <= 0).all()
    np.testing.assert_allclose(matrices.mean(axis=-1) * of.units, kept)
    np.testing.assert_array_equal(matrices[2], mask_matrices(kept[2], of.units, 48))
