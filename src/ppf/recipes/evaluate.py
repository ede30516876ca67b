"""evaluate: perplexity of any model folder with its protocol."""

from typing import Any

import numpy as np

from ppf.config import EvalConfig
from ppf.llm.load import LoadedModel
from ppf.llm.perplexity import evaluate as measure
from ppf.llm.text import take_blocks, whole_text
from ppf.recipes.choices import choose_dtype, choose_placement, choose_seq_len, tokens_per_batch


def evaluate(config: EvalConfig, loaded: LoadedModel) -> dict[str, Any]:
    """Token-weighted perplexity.

    Args:
        config: Text, sequence length, device and precision.
        loaded: A dense or an exported model.

    Returns:
        ``{"ppl", "log_ppl", "interval", "tokens", "protocol"}``; the interval is that of the perplexity, 95 %,
        bootstrapped over blocks.

    Raises:
        InputError: No such text, or too short for one block.
    """
    where = choose_placement(config.device)
    device = where.device
    model = loaded.on(where, choose_dtype(config.dtype, device, loaded.dtype))
    length = choose_seq_len(config.seq_len, model.config.max_position_embeddings)
    stream = whole_text(config.text, loaded.tokenizer)
    blocks = take_blocks(stream, length, config.tokens, 0, config.text)
    result = measure(model, blocks, tokens_per_batch(device))
    return {
        "ppl": float(np.exp(result.log_ppl)),
        "log_ppl": result.log_ppl,
        "interval": [float(np.exp(end)) for end in result.interval],
        "tokens": result.tokens,
        "protocol": {
            "text": config.text,
            "seq_len": length,
            "blocks": len(blocks),
            "predicted_tokens": len(blocks) * (length - 1),
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": device.type,
        },
    }
