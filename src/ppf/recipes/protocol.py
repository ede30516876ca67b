"""What every figure of a study depends on, field by field, so that figures of different kinds never mix."""

from typing import Any

import torch

from ppf.errors import DamagedError
from ppf.llm.hub import revision_of
from ppf.llm.load import LoadedModel, tokenizer_digest
from ppf.llm.text import Text
from ppf.study import MEASURE_VERSION, StudyFolder


def protocol_of(loaded: LoadedModel, text: Text, dtype: torch.dtype) -> dict[str, Any]:
    """How a model is measured.

    Args:
        loaded: The dense model.
        text: What it is measured on.
        dtype: In which precision.

    Returns:
        JSON-ready: hashes of weights, tokenizer and corpus, the commit of a hub's model, tokens of a block and from one block
        to the next, the precision, and the version of the formula.
    """
    length = int(text.search.shape[1])
    return {
        "weights": loaded.digest,
        "revision": revision_of(loaded.folder),
        "tokenizer": tokenizer_digest(loaded.tokenizer),
        "corpus": text.digest,
        "window": length,
        "stride": length,
        "dtype": str(dtype).removeprefix("torch."),
        "formula": MEASURE_VERSION,
    }


def check_protocol(study: StudyFolder, now: dict[str, Any]) -> None:
    """Refuses to go on with a study in another way than it began; one of before this was kept says nothing.

    Raises:
        DamagedError: A field differs; it is named. The commit only counts where both are of the hub.
    """
    for name, was in study.record.get("protocol", {}).items():
        known = name != "revision" or None not in (was, now.get(name))
        if known and was != now.get(name):
            what = f"its {name} was {was} and is {now.get(name)}"
            raise DamagedError(f"{study.folder} must measure as it began; {what}; fit again in a new folder")
