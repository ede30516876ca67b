"""What the server knows of a study, as JSON-ready records. No HTTP and no language model here."""

from pathlib import Path
from typing import Any

import numpy as np

from ppf.config import Target
from ppf.decide import Decider
from ppf.provenance import own_name
from ppf.samples import kept_matrix
from ppf.space.budget import largest_ratio

_POINTS = 600


def study_record(decider: Decider, live: bool) -> dict[str, Any]:
    """The model, its range of ratios, the predictor's held-out figures, and what was measured.

    Args:
        decider: Of the study.
        live: Whether a model is served too.
    """
    study, layout = decider.study, decider.layout
    report = decider.report
    heldout, dense = report.get("heldout", {}), decider.dense_log_ppl
    settings = study.record["settings"]
    return {
        "model": {
            "name": own_name(study.record["model"]["name"]),
            "type": layout.model_type,
            "layers": layout.layers,
            "params": layout.total,
            "prunable": layout.prunable,
            "bytes_per_param": study.record["model"]["bytes_per_param"],
        },
        "ratios": {"max": float(decider.agent.max_ratio), "floor": largest_ratio(decider.layout)},
        "dense": {"log_ppl": dense, "ppl": float(np.exp(dense))},
        "predictor": {"kind": report.get("predictor"), "heldout": heldout.get(report.get("predictor"))},
        "protocol": {
            "text": Path(settings.get("test_text") or settings.get("text") or "").name,
            "seq_len": study.record["seq_len"],
            "tokens": study.record["dense"]["test"].get("tokens"),
            "dtype": study.record["dtype"],
        },
        "points": points(decider),
        "live": live,
    }


def points(decider: Decider, most: int = _POINTS) -> list[dict[str, Any]]:
    """Measured samples, by ratio; evenly thinned to at most ``most``.

    They were measured on the search text. Their log-perplexity is moved by the difference that the dense model has between
    the two texts, so that they lie on the axis of the predictions.
    """
    store = decider.study.store()
    try:
        samples = store.all()
    finally:
        store.close()
    layout, dense = decider.layout, decider.study.record["dense"]
    shift = dense["test"]["log_ppl"] - dense["search"]["log_ppl"]
    gone = (layout.prunable - kept_matrix(samples, layout) @ layout.costs) / layout.prunable
    order = np.argsort(gone, kind="stable")
    chosen = order[np.unique(np.linspace(0, len(order) - 1, most).astype(int))] if len(order) > most else order
    return [
        {"ratio": round(float(gone[index]), 5), "log_ppl": samples[index].log_ppl + shift, "kind": samples[index].purpose}
        for index in chosen
    ]


def policy_record(decider: Decider, target: Target) -> dict[str, Any]:
    """The record of ``ppf policy``, and the bytes in the checkpoint's dtype that the weights and a token in a KV cache take."""
    decision, layout = decider.decide(target), decider.layout
    kept, item = decision.allocation.kept, decider.study.record["model"]["bytes_per_param"]
    cache = int(kept @ np.array([site.cache for site in layout.sites]))
    return {
        **decision.to_json(layout),
        "memory": int(decision.params[1] * item),
        "kv_bytes_per_token": int(cache * item),
    }
