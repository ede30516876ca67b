"""How good are the reference models? Perplexity of each on text that none was trained on.

python benchmarks/reference.py --books FOLDER --also NAME=MODEL    # .txt files beside the embedded documentation
"""

import argparse
from pathlib import Path

from ppf.config import EvalConfig
from ppf.llm.load import load_model
from ppf.recipes.evaluate import evaluate
from record import HERE, write

MODELS = {"ref-a": "ref-a", "ref-q": str(HERE / "models" / "ref-q")}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--books", type=Path, default=None)
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--also", nargs="*", default=[], metavar="NAME=MODEL", help="models that do not lie in the repository")
    arguments = parser.parse_args()
    books = sorted(arguments.books.glob("*.txt")) if arguments.books else []
    texts = {"pydocs": "pydocs"} | {path.stem: str(path) for path in books}
    found = {}
    for name, place in {**MODELS, **dict(one.split("=", 1) for one in arguments.also)}.items():
        loaded = load_model(place)
        shape = {"family": loaded.layout.model_type, "layers": loaded.layout.layers, "parameters": loaded.layout.total}
        perplexities = {}
        for text, source in texts.items():
            record = evaluate(EvalConfig(place, text=source, tokens=arguments.tokens, device="cpu"), loaded)
            perplexities[text] = {"ppl": round(record["ppl"], 2), "interval": [round(end, 2) for end in record["interval"]]}
        found[name] = {**shape, "perplexity": perplexities}
    write("reference", 0, {"tokens": arguments.tokens, "models": found})


if __name__ == "__main__":
    main()
