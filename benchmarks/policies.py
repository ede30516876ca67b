"""How good are the policies, truly? Log-perplexity above dense on test text, which no search has seen.

Same importance, same exact budget, same surgery for all: uniform, the additive optimum (knapsack over single-site damages),
the agent as it comes, and the agent refined by search and 16 true measurements on the search text.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does

import argparse
import math
import shutil
import tempfile

import numpy as np
import torch

from ppf.config import Target
from ppf.decide import Decider
from ppf.llm.load import load_model
from ppf.llm.masking import masked
from ppf.llm.perplexity import evaluate
from ppf.llm.text import Text
from ppf.progress import Progress
from ppf.recipes.prune import refined
from ppf.space.policy import Policy
from record import write


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--study", default="runs/demo")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    parser.add_argument("--name", default="policies")
    arguments = parser.parse_args()
    copy = tempfile.TemporaryDirectory()  # refining adds samples; the study itself stays as it was fitted
    shutil.copytree(arguments.study, f"{copy.name}/study")
    decider = Decider(f"{copy.name}/study")
    record = decider.study.record
    loaded = load_model(record["model"]["name"])
    model = loaded.on(torch.device("cpu"), torch.float32)
    text = Text.load(decider.study.path("text"), decider.layout.fingerprint)
    dense = evaluate(model, text.test, 1024)
    rows = []
    for ratio in arguments.ratios:
        target = Target(ratio=ratio)
        agent = decider.decide(target)
        prior = Policy(decider.agent.keep[decider.agent.prior.rows(np.array([ratio]))[0]])
        decisions = {
            "uniform": decider.decide(target, Policy.uniform(decider.layout)),
            "additive": decider.decide(target, prior),
            "agent": agent,
            "refined": refined(decider, agent, loaded, target, "cpu", 16, Progress(quiet=True)),
        }
        row = {"ratio": ratio}
        for name, decision in decisions.items():
            with masked(model, decider.layout, decision.mask):
                measured = evaluate(model, text.test, 1024)
            gap = measured.blocks - dense.blocks
            draws = np.random.default_rng(0).integers(0, len(gap), (2000, len(gap)))
            low, high = np.quantile(gap[draws].mean(axis=1), [0.025, 0.975])
            row[name] = {
                "above_dense": round(float(gap.mean()), 5),
                "interval": [round(float(low), 5), round(float(high), 5)],
                "predicted": round(decision.log_ppl - decider.dense_log_ppl, 5),
                "ppl": round(math.exp(measured.log_ppl), 3),
            }
        rows.append(row)
    result = {
        "model": record["model"]["name"] if record["model"]["name"] == "ref-a" else record["model"]["type"],
        "text": record["settings"]["text"].rsplit("/", 1)[-1],
        "tokens": int(text.test.size),
        "dense_ppl": round(math.exp(dense.log_ppl), 3),
        "rows": rows,
    }
    write(arguments.name, record["settings"]["seed"], result)


if __name__ == "__main__":
    main()
