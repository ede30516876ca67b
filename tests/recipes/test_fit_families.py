"""A fit and a prune of every family, from a folder to a folder: slow but for the one whose attention is normed anew."""

import numpy as np
import pytest
import torch

import ppf
import tiny_models
from ppf.llm.architectures import FAMILIES, layout_of_model
from ppf.llm.load import load_model

SETTINGS = {
    "samples": 40, "rounds": 1, "calibration_tokens": 128, "search_tokens": 256, "test_tokens": 512, "validation_tokens": 0,
    "seq_len": 16, "device": "cpu",
}  # fmt: skip
FIRST = {name.split("-")[0]: name for name in reversed(tiny_models.TINY)}
QUICK = ("olmo2",)
IDS = torch.from_numpy(tiny_models.blocks(2, 10))


@pytest.mark.parametrize(
    "family", [pytest.param(family, marks=() if family in QUICK else pytest.mark.slow) for family in sorted(FAMILIES)]
)
def test_every_family_is_fitted_and_pruned(tmp_path, family):
    ids = np.random.default_rng(0).integers(3, tiny_models.VOCAB, 4000)
    (tmp_path / "text.txt").write_text(" ".join(f"w{index}" for index in ids))
    model, tokenizer = tiny_models.model(FIRST[family]), tiny_models.tokenizer()
    text = str(tmp_path / "text.txt")
    study = ppf.fit(model, tokenizer=tokenizer, study=tmp_path / "study", text=text, quiet=True, **SETTINGS)
    layout = layout_of_model(model)
    for compensate in ("none", "bias", "ridge"):
        pruned = study.prune(ratio=0.3, compensate=compensate)
        pruned.save_pretrained(tmp_path / compensate)
        again = load_model(str(tmp_path / compensate))
        assert np.isfinite(pruned.plan["measured"]["log_ppl"])
        assert torch.equal(again.model(IDS).logits, pruned.model(IDS).logits)
        if compensate != "bias":
            kept = np.array([entry["kept"] for entry in pruned.plan["kept"]])
            assert again.layout.total == layout.kept_params(kept) < layout.total
