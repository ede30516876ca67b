"""Fit once, then any size: decide, cut, save, load again."""

from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import ppf


def main(model: str = "ref-a", text: str = "pydocs", out: str = "runs/fit_and_prune", **settings: object) -> None:
    study = ppf.fit(model, text=text, study=Path(out) / "study", **settings)  # a stopped fit goes on from where it was

    for ratio in (0.2, 0.3, 0.5):
        decision = study.policy(ratio)  # milliseconds, no model is loaded
        before, after = decision.params
        print(f"{ratio:.0%}: {before:,} -> {after:,} parameters, about {decision.log_ppl:.3f} nats/token")

    before, after = study.policy(0.3).params
    pruned = study.prune(params=str(after))  # a size in place of a ratio; memory="8GB" is the third wording
    pruned.save_pretrained(Path(out) / "smaller", force=True)
    print(pruned.plan["measured"])

    smaller = AutoModelForCausalLM.from_pretrained(Path(out) / "smaller")
    tokenizer = AutoTokenizer.from_pretrained(Path(out) / "smaller")
    print(f"loaded again: {sum(parameter.numel() for parameter in smaller.parameters()):,} parameters, {len(tokenizer)} tokens")


if __name__ == "__main__":
    main()
