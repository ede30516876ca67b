"""Cut what another tool decided: a pruning ratio for each layer, as JSON or CSV. No study is needed."""

import csv
from pathlib import Path
from typing import Any

from transformers import AutoConfig

import ppf


def main(model: str = "ref-a", layers: int = 12, out: str = "runs/apply_a_plan") -> dict[str, Any]:
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)

    # The other tool's answer. Here: nothing goes in the first and the last layer, 40 % of the FFN and 20 % of attention between.
    with open(folder / "ratios.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["layer", "attn", "ffn"])
        for layer in range(layers):
            inside = 0 < layer < layers - 1
            table.writerow([layer, 0.2 * inside, 0.4 * inside])

    # The same as: ppf prune MODEL --plan ratios.csv --out smaller --force
    pruned = ppf.apply_plan(model, folder / "ratios.csv")
    pruned.save_pretrained(folder / "smaller", force=True)

    record = pruned.plan
    print(f"met {record['ratio']['met']:.3f}, {record['params']['before']:,} -> {record['params']['after']:,} parameters")
    layers_of_it = AutoConfig.from_pretrained(folder / "smaller").per_layer_config
    print("channels a layer:", [own.intermediate_size for own in layers_of_it])
    return record


if __name__ == "__main__":
    main()
