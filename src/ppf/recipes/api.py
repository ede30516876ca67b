"""The Python interface: the same jobs as on the command line, as objects."""

import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppf.config import CompensateName, DtypeName, FitConfig, PlanTarget, PruneConfig, RecoverConfig, Target
from ppf.decide import Decider, Decision
from ppf.errors import InputError
from ppf.llm.elastic import ElasticModel
from ppf.llm.load import LoadedModel, adopt_model
from ppf.progress import Progress
from ppf.recipes.apply_plan import apply_plan as cut_by_plan
from ppf.recipes.fit import fit as fit_study
from ppf.recipes.lab import load_for
from ppf.recipes.live import elastic_for
from ppf.recipes.prune import Pruned, prune
from ppf.recipes.recover import recover as recover_model
from ppf.recipes.teacher import find_teacher, plan_of
from ppf.space.plan import read_plan


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
        return self._decider.report

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
        wish = PlanTarget(**vars(target))
        PruneConfig("", "", wish, refine=refine, candidates=candidates, compensate=compensate)  # refuses what does not fit
        self._decider.budget(target)  # refuses before the model is loaded
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
    settings = _settings("fit", FitConfig, settings)
    temporary = tempfile.TemporaryDirectory(prefix="ppf-") if study is None else None
    folder = temporary.name if temporary else str(study)
    config = FitConfig(str(model) if isinstance(model, str | Path) else "", folder, **settings)
    progress = Progress(quiet)
    loaded = _loaded(model, tokenizer, progress)
    fit_study(config, progress, loaded)
    fitted = Study(folder, model, tokenizer)
    fitted._loaded, fitted._temporary = loaded, temporary
    return fitted


def apply_plan(
    model: str | Path | PreTrainedModel,
    plan: str | Path | list[Any] | dict[str, Any],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    text: str | Path | None = None,
    align: int = 1,
    tp: int = 1,
    compensate: CompensateName = "none",
    device: str = "auto",
    quiet: bool = True,
) -> Pruned:
    """Prunes a model as a plan says, without a study.

    Args:
        model: As in ``fit``.
        plan: The file ``ppf.json`` of an export of a model of the same shape, a ``.json`` or ``.csv`` file of pruning ratios a
            layer, or what such a JSON file holds, such as ``[0.1, 0.3, 0.5]``.
        tokenizer: As in ``fit``.
        text: What to calibrate and to measure on, as in ``fit``; by default neither is done.
        align: With ratios: FFN channels stay in multiples of this.
        tp: With ratios: KV groups, and channels, stay in multiples of this.
        compensate: As in ``Study.prune``; needs a text.
        device: Where to measure.
        quiet: Show no progress.

    Raises:
        InputError: A plan, a text or a setting that cannot be used.
        DamagedError: A plan that is not whole, or was made for a model of another shape.
    """
    target = PlanTarget(align=None if align == 1 else align, tp=tp)
    named, known = plan if isinstance(plan, str | Path) else "", model if isinstance(model, str | Path) else ""
    words = None if text is None else str(text)
    config = PruneConfig(str(known), "", target, plan=str(named), text=words, compensate=compensate, device=device)
    record, progress = read_plan(Path(plan)) if isinstance(plan, str | Path) else plan, Progress(quiet)
    return cut_by_plan(record, _loaded(model, tokenizer, progress), config, progress)


def recover(
    model: str | Path | PreTrainedModel | Pruned,
    *,
    teacher: str | Path | PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    quiet: bool = True,
    **settings: Any,
) -> Pruned:
    """Trains a copy of a pruned model to answer as the dense one does again; save it with ``save_pretrained``.

    Args:
        model: A folder, a hub id, what ``prune`` gave, or a transformers model; it is not changed.
        teacher: The model to learn from; by default the dense one that the plan names; ``"none"`` learns from the text alone.
        tokenizer: Of models given as objects, unless it lies where they came from.
        quiet: Show no progress.
        **settings: Fields of ``RecoverConfig``: ``text``, ``tokens``, ``lora_rank``, ``full``, ``lr``, ``seed`` ...

    Returns:
        The trained model; its plan has a record ``recovered`` with the figures before and after.

    Raises:
        InputError: A setting, a text or a teacher that cannot be used, or a loss that is no longer finite.
    """
    progress = Progress(quiet)
    config = RecoverConfig("", **_settings("recover", RecoverConfig, settings))
    plan: dict[str, Any] = {}
    if isinstance(model, Pruned):
        loaded, plan = adopt_model(model.model, model.tokenizer), model.plan
    else:
        loaded = _loaded(model, tokenizer, progress)
        if loaded.folder is not None:
            plan = plan_of(loaded.folder)
    if isinstance(teacher, PreTrainedModel):
        dense: LoadedModel | None = adopt_model(teacher, tokenizer or loaded.tokenizer)
    else:
        dense = find_teacher(None if teacher is None else str(teacher), plan, progress)
    return recover_model(config, loaded, plan, dense, progress)


def _settings(job: str, kind: type, settings: dict[str, Any]) -> dict[str, Any]:
    """Fields of a config, paths among them as text.

    Raises:
        InputError: A field that does not exist.
    """
    known = [field.name for field in fields(kind)]
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise InputError(f"a setting of {job} must be one of {', '.join(known)}; {unknown[0]!r} came; check the spelling")
    return {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}


def _loaded(model: str | Path | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, progress: Progress) -> LoadedModel:
    return load_for(str(model), progress) if isinstance(model, str | Path) else adopt_model(model, tokenizer)
