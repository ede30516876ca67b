"""Perplexity of token blocks, token-weighted, and the KL divergence from the dense model.

A text is cut into blocks of ``L`` tokens; each block is one sequence and predicts its last ``L - 1`` tokens. Nothing but
the tokenizer's own tokens is put in. All figures are in nats per predicted token.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from ppf.errors import DamagedError, ResourceError
from ppf.llm.head import in_parts, logits_of, states_of

_TOP = 64
_DRAWS = 2000
_NO_MEMORY = ("DefaultCPUAllocator", "out of memory", "ALLOC_FAILED")


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Log-perplexity of one model on one text.

    Attributes:
        log_ppl: Nats/token.
        interval: 95 % interval of ``log_ppl``, bootstrapped over blocks.
        tokens: Tokens run through the model.
        blocks: Float[B], mean nats/token of each block, in the order of the text.
    """

    log_ppl: float
    interval: tuple[float, float]
    tokens: int
    blocks: np.ndarray


@dataclass(frozen=True, eq=False)
class Reference:
    """What the dense model says of a text: per token its likeliest tokens and the rest as one.

    Attributes:
        tokens: Int[B, T, K], the dense model's K likeliest next tokens.
        log_probs: Float[B, T, K + 1], their log-probabilities, and that of all others together.
    """

    tokens: torch.Tensor
    log_probs: torch.Tensor

    def of(self, rows: Sequence[int]) -> "Reference":
        """The same for some of the blocks."""
        return Reference(self.tokens[list(rows)], self.log_probs[list(rows)])


def evaluate(model: PreTrainedModel, blocks: np.ndarray, tokens_per_batch: int = 4096, seed: int = 0) -> Evaluation:
    """Log-perplexity with its interval.

    Args:
        model: Any causal LM.
        blocks: Int[B, L] token ids.
        tokens_per_batch: How many go through the model at once.
        seed: Of the bootstrap.

    Returns:
        The same number, to rounding, as a plain loop over ``model(...).logits``.

    Raises:
        DamagedError: A loss is not finite.
        ResourceError: One block is too much for the memory.
    """
    losses = _losses(model, blocks, tokens_per_batch, None)[0]
    return summarise(losses, blocks.size, seed)


def summarise(losses: np.ndarray, tokens: int, seed: int = 0) -> Evaluation:
    """Mean over blocks of equal length with a bootstrap interval; Float[B] nats/token.

    Raises:
        DamagedError: A loss is not finite.
    """
    bad = int((~np.isfinite(losses)).sum())
    if bad:
        came = f"{bad} of {len(losses)} blocks gave none, as with NaN among the weights or numbers too large for the dtype"
        raise DamagedError(f"a model must give finite losses; {came}; try --dtype float32, else restore the model")
    draws = np.random.default_rng(seed).integers(0, len(losses), (_DRAWS, len(losses)))
    low, high = np.quantile(losses[draws].mean(axis=1), [0.025, 0.975])
    return Evaluation(float(losses.mean()), (float(low), float(high)), tokens, losses)


def measure(
    model: PreTrainedModel, blocks: np.ndarray, reference: Reference | None, tokens_per_batch: int = 4096
) -> tuple[np.ndarray, np.ndarray]:
    """Log-perplexity and KL to the dense model.

    Args:
        model: The masked or cut model.
        blocks: Int[B, L] token ids.
        reference: The dense model's answers on the same blocks; None gives a KL of 0.
        tokens_per_batch: How many tokens go through the model at once.

    Returns:
        Float[B] both, nats/token of each block, not finite where the model's logits are not. The KL is between
        distributions over the dense model's 64 likeliest tokens and "any other", which counts as 1e-6 at least; so it is at
        most the full one, to within 1e-6.

    Raises:
        ResourceError: One block is too much for the memory.
    """
    return _losses(model, blocks, tokens_per_batch, reference)


@torch.inference_mode()
def reference_of(model: PreTrainedModel, blocks: np.ndarray, tokens_per_batch: int = 4096) -> Reference:
    """The dense model's answers on a text, for ``measure``.

    Raises:
        ResourceError: One block, or all answers, are too much for the memory.
    """
    kept_tokens, kept_probs = [], []
    with enough_memory():
        for log_probs in _log_probs(model, blocks, tokens_per_batch):
            values, tokens = log_probs.topk(min(_TOP, log_probs.shape[-1] - 1), dim=-1)
            kept_tokens.append(tokens)
            kept_probs.append(torch.cat([values, _rest(values)], dim=-1))
        tokens, probs = torch.cat(kept_tokens), torch.cat(kept_probs)
    return Reference(*(kept.unflatten(0, (len(blocks), -1)) for kept in (tokens, probs)))


@torch.inference_mode()
def _losses(
    model: PreTrainedModel, blocks: np.ndarray, tokens_per_batch: int, reference: Reference | None
) -> tuple[np.ndarray, np.ndarray]:
    targets = torch.from_numpy(np.ascontiguousarray(blocks[:, 1:])).long().flatten()
    found = torch.zeros(2, len(targets), dtype=torch.float64)
    end = 0
    with enough_memory():
        for log_probs in _log_probs(model, blocks, tokens_per_batch):
            start, end = end, end + len(log_probs)
            found[0, start:end] = -log_probs.gather(-1, targets[start:end, None].to(log_probs.device)).squeeze(-1).cpu()
            if reference is not None:
                found[1, start:end] = _divergences(log_probs, reference, slice(start, end)).cpu()
    losses, divergences = found.unflatten(1, (len(blocks), -1)).mean(-1).numpy()
    return losses, divergences


def _divergences(log_probs: torch.Tensor, reference: Reference, tokens: slice) -> torch.Tensor:
    """Float[n]: from what the dense model says of these of all predicted tokens."""
    listed, dense = (kept.flatten(0, 1)[tokens] for kept in (reference.tokens, reference.log_probs))
    values = log_probs.gather(-1, listed)
    other = torch.cat([values, _rest(values)], dim=-1)
    return (dense.exp() * (dense - other)).sum(-1)


def _rest(log_probs: torch.Tensor) -> torch.Tensor:
    """Log-probability of everything not listed; Float[T, K] -> Float[T, 1]."""
    return torch.log1p(-log_probs.exp().sum(-1, keepdim=True).clamp(max=1 - 1e-6))


def _log_probs(model: PreTrainedModel, blocks: np.ndarray, tokens_per_batch: int) -> Iterator[torch.Tensor]:
    """Float[n, V] in float32, of all predicted tokens in order, some at a time."""
    size = max(1, tokens_per_batch // blocks.shape[1])
    for start in range(0, len(blocks), size):
        for states in _states(model, blocks[start : start + size]):
            for part in in_parts(model, states):
                yield logits_of(model, part).log_softmax(-1)


def _states(model: PreTrainedModel, rows: np.ndarray) -> Iterator[torch.Tensor]:
    """Of all rows in order; on too little memory the batch is halved until single rows are left."""
    try:
        states = states_of(model, rows)
    except (MemoryError, RuntimeError) as error:
        if len(rows) == 1 or not is_memory(error):
            raise
    else:
        yield states
        return
    half = len(rows) // 2
    yield from _states(model, rows[:half])
    yield from _states(model, rows[half:])


@contextmanager
def enough_memory() -> Iterator[None]:
    """Turns a lack of memory that smaller batches could not cure into our error."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_memory(error):
            raise
        raise ResourceError(
            "a model and one block's logits must fit in memory; they do not; give a smaller --seq-len or dtype, or fewer --workers"
        ) from error


def is_memory(error: Exception) -> bool:
    """Whether an error is a lack of memory: an accelerator's is a RuntimeError of its own or one that only its words tell."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(words in str(error) for words in _NO_MEMORY)
