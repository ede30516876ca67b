"""Fit a model that is in memory already, such as one that was just trained. The object itself is never changed."""

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import ppf


def main(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str = "pydocs", **settings: object) -> ppf.Pruned:
    study = ppf.fit(model, tokenizer=tokenizer, text=text, **settings)  # without `study` the folder is a temporary one
    pruned = study.prune(ratio=0.3, refine=True, candidates=4)  # static pruning: a few candidates are measured
    print(f"measured perplexity {pruned.plan['measured']['ppl']:.2f}, dense {pruned.plan['dense']['ppl']:.2f}")
    assert pruned.model is not model
    return pruned


if __name__ == "__main__":
    folder = "my-model"
    main(AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder), text="self")
