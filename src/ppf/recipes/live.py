"""live: a study's dense model, elastic."""

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppf.config import DtypeName, Target
from ppf.decide import Decider
from ppf.errors import DamagedError, InputError
from ppf.llm.elastic import ElasticModel
from ppf.llm.load import LoadedModel, adopt_model
from ppf.progress import Progress
from ppf.recipes.choices import check_named, choose_dtype, choose_whole
from ppf.recipes.lab import load_for
from ppf.space.allocation import Allocation


def elastic_for(
    decider: Decider,
    model: str | Path | PreTrainedModel | None,
    device: str,
    dtype: DtypeName,
    progress: Progress,
    tokenizer: PreTrainedTokenizerBase | None = None,
    nested: bool = False,
) -> tuple[ElasticModel, PreTrainedTokenizerBase]:
    """Loads the dense model anew and makes it elastic: its units change places, so no other use may share it.

    Args:
        decider: Of the study.
        model: A name, or an object, which is not changed; None is where the model was when the study was fitted.
        device: As in fit.
        dtype: As in fit.
        progress: Shows what happens.
        tokenizer: Of a model given as an object.
        nested: Whether ``set_ratio`` decides by nested policies.

    Returns:
        The elastic model and its tokenizer.

    Raises:
        InputError: No such model.
        DamagedError: The study is of another model.
        UnsupportedError: A model that cannot be elastic.
    """
    where = choose_whole(device, "a live model")
    loaded = _loaded(decider, model, tokenizer, progress)
    known = decider.study.record["model"]
    if loaded.digest != known["digest"]:
        raise DamagedError(f"the study must be one of this model; it is one of {known['name']} as it was then; give its own model")
    dense = loaded.on(where, choose_dtype(dtype, where.device, loaded.dtype))

    def decide(ratio: float) -> Allocation:
        return decider.decide(Target(ratio=ratio, nested=nested)).allocation

    return ElasticModel(dense, decider.layout, decider.importance, decide), loaded.tokenizer


def _loaded(
    decider: Decider, model: str | Path | PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase | None, progress: Progress
) -> LoadedModel:
    if isinstance(model, PreTrainedModel):
        return adopt_model(model, tokenizer)
    if model is not None:
        return load_for(str(model), progress)
    name = str(decider.study.record["model"]["name"])
    check_named(name)
    try:
        return load_for(name, progress)
    except InputError as error:
        if Path(name).is_dir():  # something else is wrong with it
            raise
        raise InputError(
            f"the study's model must lie where it lay then; {name!r} is none now; say with --model where it is"
        ) from error
