"""The Python interface: the same jobs as on the command line, as objects."""

import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppf.artifact import read_json
from ppf.config import CompensateName, DtypeName, FitConfig, Target
from ppf.decide import Decider, Decision
from ppf.errors import InputError
from ppf.llm.elastic import ElasticModel
from ppf.llm.load import LoadedModel, adopt_model
from ppf.progress import Progress
from ppf.recipes.fit import fit as fit_study
from ppf.recipes.lab import load_for
from ppf.recipes.live import elastic_for
from ppf.recipes.prune import Pruned, check_refinable, prune


class Study:
    """A fitted study: any ratio is one call away.

    Args:
        folder: Of a finished fit.
        model: Its dense model, as in ``fit``; by default it is loaded from where it was, when a checkpoint is cut.
        tokenizer: As in ``fit``.

    Raises:
        InputError: No study there, or one that is not fitted.
        DamagedError: An artefact is not whole.
    """

    def __init__(
        self,
        folder: str | Path,
        model: str | Path | PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self.folder = Path(folder)
        self._decider = Decider(folder)
        self._model, self._tokenizer = self._decider.study.record["model"]["name"] if model is None else model, tokenizer
        self._loaded: LoadedModel | None = None
        self._temporary: tempfile.TemporaryDirectory | None = None

    @property
    def report(self) -> dict[str, Any]:
        """What the fit reported: the predictor's held-out figures, times, tokens."""
        return read_json(self.folder / "report.json")

    def policy(
        self,
        ratio: float | None = None,
        *,
        params: str | None = None,
        memory: str | None = None,
        align: int = 1,
        tp: int = 1,
        nested: bool = False,
    ) -> Decision:
        """Decides alone, in milliseconds; no model is loaded.

        Args:
            ratio: Share of the prunable parameters to remove, in [0, 1).
            params: Or parameters that may stay, such as ``"3M"``.
            memory: Or bytes that the weights may have, such as ``"500MiB"``.
            align: FFN channels stay in multiples of this.
            tp: KV groups, and channels, stay in multiples of this.
            nested: Take policies of which what is gone at one ratio is gone at every larger one.
        """
        return self._decider.decide(Target(ratio, params, memory, align, tp, nested))

    def prune(
        self,
        ratio: float | None = None,
        *,
        params: str | None = None,
        memory: str | None = None,
        align: int = 1,
        tp: int = 1,
        nested: bool = False,
        refine: bool = False,
        candidates: int = 16,
        compensate: CompensateName = "none",
        device: str = "auto",
        quiet: bool = True,
    ) -> Pruned:
        """Makes a smaller model; save it with ``save_pretrained``.

        Args:
            ratio: As in ``policy``; so are ``params``, ``memory``, ``align``, ``tp`` and ``nested``.
            refine: Search at this size and measure the best candidates truly.
            candidates: How many.
            compensate: Make up for what goes, by biases (``"bias"``) or by fitting what stays again (``"ridge"``).
            device: Where to measure.
            quiet: Show no progress.
        """
        target = Target(ratio, params, memory, align, tp, nested)
        if compensate not in get_args(CompensateName):
            raise InputError(f"compensate must be one of {', '.join(get_args(CompensateName))}; {compensate!r} came; choose one")
        self._decider.budget(target)  # refuses before the model is loaded
        check_refinable(target, refine)
        progress = Progress(quiet)
        if self._loaded is None:
            self._loaded = _loaded(self._model, self._tokenizer, progress)
        return prune(self.folder, self._loaded, target, device, candidates if refine else 0, progress, compensate)

    def live(
        self, ratio: float = 0.0, *, nested: bool = False, device: str = "auto", dtype: DtypeName = "auto", quiet: bool = True
    ) -> ElasticModel:
        """The dense model, of which any size runs at once: ``set_ratio`` changes it between two calls.

        Args:
            ratio: To start with.
            nested: Let ``set_ratio`` decide by nested policies, so that KV caches stay usable while the ratio rises.
            device: Where it runs.
            dtype: As in fit.
            quiet: Show no progress.

        Raises:
            InputError: More than the floors allow.
            UnsupportedError: A model whose layers no prefix can make smaller.
        """
        self._decider.decide(Target(ratio, nested=nested))  # refuses before the model is loaded
        elastic, _ = elastic_for(self._decider, self._model, device, dtype, Progress(quiet), self._tokenizer, nested)
        elastic.set_ratio(ratio)
        return elastic


def fit(
    model: str | Path | PreTrainedModel,
    *,
    study: str | Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    quiet: bool = False,
    **settings: Any,
) -> Study:
    """Learns how to prune a model.

    Args:
        model: A folder, a hub id, ``"ref-a"``, or a transformers model, which is not changed.
        study: The study folder; a started one is continued. By default a temporary one, gone with the returned object.
        tokenizer: Of a model given as an object, unless it lies where the model came from.
        quiet: Show no progress.
        **settings: Fields of ``FitConfig``: ``text``, ``samples``, ``score``, ``seed`` ...

    Raises:
        InputError: A setting that does not exist or is out of range.
    """
    unknown = sorted(set(settings) - {field.name for field in fields(FitConfig)})
    if unknown:
        known = ", ".join(field.name for field in fields(FitConfig))
        raise InputError(f"a setting of fit must be one of {known}; {unknown[0]!r} came; check the spelling")
    temporary = tempfile.TemporaryDirectory(prefix="ppf-") if study is None else None
    folder = temporary.name if temporary else str(study)
    for name in ("text", "test_text"):
        if isinstance(settings.get(name), Path):
            settings[name] = str(settings[name])
    config = FitConfig(str(model) if isinstance(model, str | Path) else "", folder, **settings)
    progress = Progress(quiet)
    loaded = _loaded(model, tokenizer, progress)
    fit_study(config, progress, loaded)
    fitted = Study(folder, model, tokenizer)
    fitted._loaded, fitted._temporary = loaded, temporary
    return fitted


def _loaded(model: str | Path | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, progress: Progress) -> LoadedModel:
    return load_for(str(model), progress) if isinstance(model, str | Path) else adopt_model(model, tokenizer)
