"""Does the predictor still rank with 32 KV groups in a layer? A random model: no trained one of that shape is at hand.

Weights are drawn three times wider than an untrained model's, so that what is removed changes what it says. Its damages
mean nothing; that they can be predicted from a few hundred masks is all that is asked.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from ppf.artifact import read_json
from ppf.config import FitConfig
from ppf.llm.load import quiet_transformers
from ppf.progress import Progress
from ppf.recipes.fit import fit
from record import HERE, write

EMBEDDED = HERE.parent / "src" / "ppf" / "models" / "ref-a"
SHAPE = {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 32, "head_dim": 8, "intermediate_size": 512}


def random_model(groups: int, folder: Path, seed: int) -> None:
    """Saves a model and the embedded model's tokenizer."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    config = LlamaConfig(
        vocab_size=len(tokenizer), num_key_value_heads=groups, initializer_range=0.06, max_position_embeddings=256,
        bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id, tie_word_embeddings=True, **SHAPE,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--groups", type=int, default=32)
    arguments = parser.parse_args()
    quiet_transformers()
    with tempfile.TemporaryDirectory() as temporary:
        model, study = Path(temporary) / "random", Path(temporary) / "study"
        random_model(arguments.groups, model, arguments.seed)
        fit(FitConfig(str(model), str(study), seed=arguments.seed, device="cpu"), Progress())
        report = read_json(study / "report.json")
    kept = ("predictor", "heldout", "samples", "tokens")
    write("many_groups", arguments.seed, {"groups": arguments.groups, **SHAPE, **{name: report[name] for name in kept}})


if __name__ == "__main__":
    main()
