"""How well do predictors order masks of one size? The held-out masks of all fits of each model, as each fit reported them.

python benchmarks/order.py runs/a? runs/q? runs/s?
"""

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

from ppf.provenance import own_name
from ppf.study import StudyFolder
from record import write


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("studies", nargs="+")
    studies = [StudyFolder(Path(folder)) for folder in parser.parse_args().studies]
    models: dict[str, dict[str, Any]] = defaultdict(lambda: {"seeds": [], "masks": 0, "fitted": 0, "predictors": defaultdict(list)})
    for study in studies:
        settings, heldout = study.record["settings"], study.report["heldout"]
        model = models[own_name(study.record["model"]["name"])]
        model["seeds"].append(settings["seed"])
        model["masks"], model["fitted"] = heldout["additive"]["count"], settings["samples"] - heldout["additive"]["count"]
        for kind, found in heldout.items():
            model["predictors"][kind].append({"mse": found["mse"], "tau_within": found["tau_within"]})
    write("order", min(seed for model in models.values() for seed in model["seeds"]), {"models": models})


if __name__ == "__main__":
    main()
