"""What is asked of llama.cpp, in a process of its own: on a file that it cannot use it ends the whole process.

    python -m ppf.llm.llama_cpp_process TASK   < request as JSON   > answer as JSON

Nothing else of ppf is imported here.
"""

import ctypes
import json
import os
import sys
from typing import Any

import llama_cpp
import numpy as np

_F32 = 0


def load(request: dict[str, Any], **options: Any) -> llama_cpp.Llama:
    """The model of a file; keys and values are kept in float32, so that only the weights are rounded."""
    return llama_cpp.Llama(
        request["file"], n_ctx=request["context"], n_batch=request["context"], n_threads=request["threads"], n_gpu_layers=0,
        type_k=_F32, type_v=_F32, verbose=False, **options,
    )  # fmt: skip


def logits(request: dict[str, Any]) -> dict[str, Any]:
    """Logits of token ids, all at once and one after another through the cache, and of a text."""
    whole, steps = load(request, logits_all=True), load(request, logits_all=True)
    whole.eval(request["ids"])
    for token in request["ids"]:
        steps.eval([token])
    count = len(request["ids"])
    found = {"whole": whole.scores[:count].copy(), "steps": steps.scores[:count]}
    whole.reset()
    whole.eval(request["text"])
    np.savez(request["out"], text=whole.scores[: len(request["text"])], **found)
    return {}


def tokens(request: dict[str, Any]) -> dict[str, Any]:
    """The ids of texts; no weights are read."""
    words = llama_cpp.Llama(request["file"], vocab_only=True, verbose=False)
    return {"texts": [words.tokenize(text.encode(), add_bos=False, special=False) for text in request["texts"]]}


def quantise(request: dict[str, Any]) -> dict[str, Any]:
    """Quantises a file into another."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = request["type"], max(1, os.cpu_count() or 1)
    code = llama_cpp.llama_model_quantize(request["file"].encode(), request["out"].encode(), ctypes.byref(params))
    if code:
        raise RuntimeError(f"llama_model_quantize gave {code}")
    return {}


TASKS = {"logits": logits, "tokens": tokens, "quantise": quantise}

if __name__ == "__main__":
    print(json.dumps(TASKS[sys.argv[1]](json.load(sys.stdin))))
