import numpy as np
import pytest
import torch
from torch.nn import functional

import tiny_models as tiny
from builders import random_mask, refuses
from ppf.errors import DamagedError, ResourceError
from ppf.llm import perplexity
from ppf.llm.architectures import layout_of_model
from ppf.llm.load import load_model
from ppf.llm.masking import masked
from ppf.llm.perplexity import evaluate, measure, reference_of, summarise
from ppf.llm.surgery import cut
from ppf.llm.text import TextSizes, load_text

BLOCKS = tiny.blocks(7, 12)
FAILURES = [
    torch.OutOfMemoryError("CUDA out of memory"),
    MemoryError(),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]


def means(*arguments):
    """Log-perplexity and KL over all blocks."""
    return tuple(part.mean() for part in measure(*arguments))


@pytest.fixture(scope="module")
def trained():
    """The embedded model in float32, its layout, and blocks of text."""
    loaded = load_model("ref-a")
    blocks = load_text("pydocs", loaded.tokenizer, TextSizes(64, 64, 512, 0, 64), 0).search
    return loaded.model.to(torch.float32), loaded.layout, blocks


def pruned(name="qwen2-gqa", seed=0):
    model = tiny.model(name)
    layout = layout_of_model(model)
    return model, cut(model, layout, random_mask(layout, seed))


@torch.inference_mode()
def by_loop(model, blocks):
    """Mean loss in nats over all predicted tokens, one token after the other."""
    losses = []
    for row in blocks:
        for place in range(1, len(row)):
            logits = model(torch.from_numpy(row[None, :place])).logits[0, -1]
            losses.append(-logits.double().log_softmax(-1)[row[place]].item())
    return np.mean(losses)


def full_divergence(dense, other, blocks):
    """KL in nats over the whole vocabulary."""
    p, q = (tiny.logits(model, blocks)[:, :-1].double().log_softmax(-1) for model in (dense, other))
    return (p.exp() * (p - q)).sum(-1).mean().item()


# --- log-perplexity ---


@pytest.mark.parametrize("name", tiny.TINY)
def test_it_is_that_of_a_plain_loop(name):
    model, smaller = pruned(name)
    for one in (model, smaller):
        expected = by_loop(one, BLOCKS[:3])
        assert evaluate(one, BLOCKS[:3]).log_ppl == pytest.approx(expected, abs=1e-5)
        assert means(one, BLOCKS[:3], None)[0] == pytest.approx(expected, abs=1e-5)


def test_it_is_that_of_a_plain_loop_on_real_text(trained):
    model, _, blocks = trained
    expected = by_loop(model, blocks[:2, :24])
    assert evaluate(model, blocks[:2, :24]).log_ppl == pytest.approx(expected, abs=1e-5)
    assert 1 < expected < 6


def test_every_token_weighs_the_same():
    model = tiny.model()
    result = evaluate(model, BLOCKS)
    logits = tiny.logits(model, BLOCKS)[:, :-1]
    pooled = functional.cross_entropy(logits.reshape(-1, tiny.VOCAB), torch.from_numpy(BLOCKS)[:, 1:].reshape(-1)).item()
    assert result.log_ppl == pytest.approx(pooled, abs=1e-6) == pytest.approx(result.blocks.mean(), abs=1e-6)
    assert result.blocks.shape == (7,) and result.tokens == BLOCKS.size
    for index, row in enumerate(BLOCKS):
        assert result.blocks[index] == pytest.approx(evaluate(model, row[None]).log_ppl, abs=1e-6)


@pytest.mark.parametrize("batch", [1, 12, 25, 60, 10**6])
def test_the_batch_size_does_not_matter(batch):
    model, smaller = pruned()
    reference = reference_of(model, BLOCKS)
    expected = means(smaller, BLOCKS, reference)
    assert means(smaller, BLOCKS, reference_of(model, BLOCKS, batch), batch) == pytest.approx(expected, abs=1e-6)
    assert evaluate(smaller, BLOCKS, batch).blocks == pytest.approx(evaluate(smaller, BLOCKS).blocks, abs=1e-6)


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint16])
def test_any_integers_and_memory_order_will_do(kind):
    model = tiny.model()
    assert evaluate(model, BLOCKS.astype(kind)).log_ppl == evaluate(model, BLOCKS).log_ppl
    assert evaluate(model, np.asfortranarray(BLOCKS)).log_ppl == evaluate(model, BLOCKS).log_ppl


def test_half_precision_is_summed_in_full(trained):
    model, _, blocks = trained
    half = load_model("ref-a").model
    logits = tiny.logits(half, blocks)[:, :-1].double()
    expected = functional.cross_entropy(logits.reshape(-1, 4096), torch.from_numpy(blocks)[:, 1:].reshape(-1)).item()
    assert evaluate(half, blocks).log_ppl == pytest.approx(expected, abs=1e-5)
    assert evaluate(half, blocks).log_ppl == pytest.approx(evaluate(model, blocks).log_ppl, abs=0.02)


def test_it_is_measured_block_by_block():
    model, smaller = pruned()
    losses, divergences = measure(smaller, BLOCKS, reference_of(model, BLOCKS))
    assert losses == pytest.approx(evaluate(smaller, BLOCKS).blocks, abs=1e-6)
    for index, row in enumerate(BLOCKS):
        alone = reference_of(model, row[None])
        assert divergences[index] == pytest.approx(measure(smaller, row[None], alone)[1][0], abs=1e-6)
    some = reference_of(model, BLOCKS).of([4, 1])
    assert measure(smaller, BLOCKS[[4, 1]], some)[1] == pytest.approx(divergences[[4, 1]], abs=1e-6)


def test_the_model_is_not_changed():
    model, smaller = pruned()
    before = tiny.snapshot(model)
    means(model, BLOCKS, reference_of(model, BLOCKS))
    evaluate(model, BLOCKS)
    assert tiny.snapshot(model) == before


def test_numbers_that_are_not_finite_come_through():
    model = tiny.model()
    reference = reference_of(model, BLOCKS)
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    assert all(np.isnan(means(model, BLOCKS, reference)))
    with refuses(DamagedError) as caught:
        evaluate(model, BLOCKS)
    assert "--dtype" in str(caught.value) and "7 of 7" in str(caught.value)


@pytest.mark.parametrize("loss", [np.nan, np.inf, -np.inf])
def test_losses_that_are_not_finite_have_no_mean(loss):
    with refuses(DamagedError):
        summarise(np.array([1.0, loss, 2.0]), 36)


# --- its interval ---


def coverage(repeats, paired, seed=0):
    """The share of intervals that hold the truth: of a model's losses, or of what a pruned one loses on the same blocks."""
    rng, covered, widths = np.random.default_rng(seed), 0, []
    for repeat in range(repeats):
        dense = rng.gamma(9, 1 / 3, 60)
        pruned = 1.02 * dense + rng.gamma(4, 0.01, 60)
        low, high = summarise(pruned - dense if paired else dense, 60 * 12, seed=repeat).interval
        covered += low <= (0.1 if paired else 3) <= high
        widths.append(high - low)
    return covered / repeats, float(np.mean(widths))


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize(("repeats", "least", "most"), [(300, 0.91, 0.98), pytest.param(1000, 0.93, 0.97, marks=pytest.mark.slow)])
def test_the_interval_covers_the_truth_as_often_as_it_says(repeats, least, most, paired):
    share, width = coverage(repeats, paired)
    assert least <= share <= most
    assert not paired or width < coverage(20, False)[1] / 20  # what the blocks share is gone


def test_the_interval_is_seeded_holds_the_mean_and_narrows():
    losses = np.random.default_rng(0).normal(3, 0.5, 4000)
    one, same, other = summarise(losses[:50], 1), summarise(losses[:50], 1), summarise(losses[:50], 1, seed=1)
    assert one.interval == same.interval != other.interval
    assert one.interval[0] < one.log_ppl < one.interval[1]
    wide, narrow = (np.diff(summarise(losses[:count], 1).interval)[0] for count in (40, 4000))
    assert 7 < wide / narrow < 14
    assert summarise(losses[:1], 1).interval == (losses[0], losses[0])


# --- KL divergence ---


@pytest.mark.parametrize("name", tiny.TINY)
def test_the_dense_model_diverges_from_itself_by_nothing(name):
    model = tiny.model(name)
    log_ppl, kl = means(model, BLOCKS, reference_of(model, BLOCKS))
    assert abs(kl) < 1e-7 and log_ppl == evaluate(model, BLOCKS).log_ppl
    assert means(model, BLOCKS, None)[1] == 0


@pytest.mark.parametrize("seed", range(3))
def test_it_is_hardly_above_the_full_divergence_and_not_far_below(trained, seed):
    model, layout, blocks = trained
    smaller = cut(model, layout, random_mask(layout, seed))
    found = means(smaller, blocks, reference_of(model, blocks))[1]
    full = full_divergence(model, smaller, blocks)
    assert 0.9 * full < found <= full + 1e-5


@pytest.mark.parametrize("top", [8, 64, 95, 1000])
def test_more_listed_tokens_come_closer_and_all_of_them_are_exact(monkeypatch, top):
    model, smaller = pruned()
    full = full_divergence(model, smaller, BLOCKS)
    coarse = means(smaller, BLOCKS, reference_of(model, BLOCKS))[1]
    monkeypatch.setattr(perplexity, "_TOP", top)
    found = means(smaller, BLOCKS, reference_of(model, BLOCKS))[1]
    assert 0 < found <= full + 1e-6
    if top < 64:
        assert found < coarse
    if top >= 95:
        assert found == pytest.approx(full, abs=1e-5)


def test_the_reference_lists_the_likeliest_tokens_and_sums_to_one(trained):
    model, _, blocks = trained
    reference = reference_of(model, blocks[:3])
    assert reference.tokens.shape == (3, 63, 64) and reference.log_probs.shape == (3, 63, 65)
    torch.testing.assert_close(reference.log_probs.exp().sum(-1), torch.ones(3, 63), rtol=0, atol=1e-5)
    best = tiny.logits(model, blocks[:3])[:, :-1].argmax(-1)
    assert torch.equal(reference.tokens[..., 0], best)


def test_a_masked_model_is_measured_as_the_cut_one():
    model = tiny.model()
    layout = layout_of_model(model)
    mask, reference = random_mask(layout, 2), reference_of(model, BLOCKS)
    with masked(model, layout, mask):
        found = means(model, BLOCKS, reference)
    assert found == pytest.approx(means(cut(model, layout, mask), BLOCKS, reference), abs=1e-6)
    assert found[1] > 0.01


# --- too little memory ---


def short_of_memory(model, rows, failure):
    """Makes a model fail on more than so many rows; returns the sizes that it was asked for."""
    sizes = []

    def limit(_, args, options):
        sizes.append(len(options["input_ids"]))
        if sizes[-1] > rows:
            raise failure

    model.base_model.register_forward_pre_hook(limit, with_kwargs=True)
    return sizes


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_a_batch_that_does_not_fit_is_halved(failure, rows):
    model, smaller = pruned()
    reference = reference_of(model, BLOCKS)
    expected = means(smaller, BLOCKS, reference)
    sizes = short_of_memory(smaller, rows, failure)
    assert means(smaller, BLOCKS, reference) == pytest.approx(expected, abs=1e-6)
    assert sizes[0] == 7 and sum(size for size in sizes if size <= rows) == 7
    short_of_memory(model, rows, failure)
    torch.testing.assert_close(reference_of(model, BLOCKS).log_probs, reference.log_probs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("failure", FAILURES)
def test_a_block_that_does_not_fit_alone_is_said(failure):
    model = tiny.model()
    short_of_memory(model, 0, failure)
    with refuses(ResourceError):
        evaluate(model, BLOCKS)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_halves_are_never_put_together_again(monkeypatch, rows):
    """Two halves at once would need the memory that the whole did not get."""
    model = tiny.model()
    short_of_memory(model, rows, MemoryError())
    cat = torch.cat

    def small(tensors, *args, **options):
        assert tensors[0].shape[-1] != tiny.VOCAB
        return cat(tensors, *args, **options)

    monkeypatch.setattr(torch, "cat", small)
    with torch.inference_mode():
        parts = list(perplexity._log_probs(model, BLOCKS, 10**6))
    assert max(map(len, parts)) <= rows * 11 and sum(map(len, parts)) == 7 * 11


@pytest.mark.parametrize("failure", FAILURES)
def test_a_lack_of_memory_behind_the_model_is_said(monkeypatch, failure):
    def full(*_):
        raise failure

    model = tiny.model()
    reference = reference_of(model, BLOCKS)
    monkeypatch.setattr(perplexity, "_rest", full)
    for job in (lambda: reference_of(model, BLOCKS), lambda: means(model, BLOCKS, reference)):
        with refuses(ResourceError):
            job()


def test_other_failures_are_not_taken_for_a_lack_of_memory():
    model = tiny.model()
    sizes = short_of_memory(model, 0, RuntimeError("size mismatch"))
    with pytest.raises(RuntimeError, match="size mismatch"):
        evaluate(model, BLOCKS)
    assert sizes == [7]
