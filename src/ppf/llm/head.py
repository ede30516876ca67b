"""Next-token logits, some tokens at a time: those of a whole text over a large vocabulary would take more memory than the model.

hidden states ── output embeddings ──► / logits_scaling (Granite) ──► capped by a tanh (Gemma) ──► logits
"""

from collections.abc import Iterator

import numpy as np
import torch
from transformers import PreTrainedModel

from ppf.llm.placement import entry_of

LOGITS_AT_ONCE = 2**24
"""64 MiB in float32."""


def states_of(model: PreTrainedModel, rows: np.ndarray) -> torch.Tensor:
    """Float[B * (L - 1), D]: the last hidden states from which Int[B, L] token ids predict each next one, row after row."""
    ids = torch.from_numpy(np.ascontiguousarray(rows)).to(entry_of(model), torch.long)
    return model.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)


def logits_of(model: PreTrainedModel, states: torch.Tensor) -> torch.Tensor:
    """Float[N, V] in float32, as the model's own forward gives them for Float[N, D] states."""
    head, config = model.get_output_embeddings(), model.config
    assert head is not None  # only causal LMs are loaded
    logits = head(states)
    if (scale := getattr(config, "logits_scaling", 1)) != 1:
        logits = logits / scale
    if cap := getattr(config, "final_logit_softcapping", None):
        logits = torch.tanh(logits / cap) * cap
    return logits.float()


def in_parts(model: PreTrainedModel, states: torch.Tensor) -> Iterator[torch.Tensor]:
    """States in parts whose logits are few enough; Float[N, D] -> Float[n, D] each."""
    yield from states.split(max(1, LOGITS_AT_ONCE // model.config.vocab_size))
