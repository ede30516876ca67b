"""prune_files: a smaller checkpoint from the dense one's files. The mask is known, nothing is measured, no model is in memory."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from ppf.config import PruneConfig
from ppf.llm.load import Checkpoint, open_checkpoint, stored_digest
from ppf.llm.streamed import CHECKED, export_streamed
from ppf.llm.weights import readable
from ppf.progress import Progress
from ppf.recipes.choices import check_named
from ppf.recipes.prune import decider_for, dense_bytes, plan_for
from ppf.space.mask import Mask


def prune_stored(config: PruneConfig, name: str, progress: Progress) -> dict[str, Any]:
    """``ppf prune STUDY --no-measure``.

    Args:
        config: What and where; no refinement, no compensation.
        name: Of the dense model.
        progress: Shows what happens.

    Returns:
        The record of ``Pruned.plan`` without what measuring finds, with ``bytes``, ``out`` and ``checked``.

    Raises:
        InputError: More than the floors allow, a study that is not fitted, or a folder that exists.
        DamagedError: A study of another model, or a check that failed; nothing is left behind.
    """
    source = open_stored(name, progress)
    with progress.stage("reading"):
        decider = decider_for(config.study, stored_digest(source), config.target, 0)
    source = replace(source, layout=decider.layout)  # with floors of 0 where its study has them
    decision = decider.decide(config.target)
    plan = plan_for(decider, decision, False) | {"compensation": {"method": "none"}, "nested": config.target.nested}
    return written(config, source, decision.mask, plan | {"rounding": decider.rounding(config.target)}, progress)


def open_stored(name: str, progress: Progress) -> Checkpoint:
    """Opens a model's files under a progress stage.

    Raises:
        InputError: The study was fitted to an object that came from no folder.
    """
    check_named(name)
    with progress.stage("opening"):
        return open_checkpoint(name)


def written(config: PruneConfig, source: Checkpoint, mask: Mask, plan: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Cuts, writes and checks; what is to be said of it."""
    with progress.stage("cutting, writing and checking"), readable(source.folder):
        size = export_streamed(source, mask, plan, Path(config.out), config.force)
    before = dense_bytes(source, 0)
    return {**plan, "bytes": {"before": before, "after": size}, "out": config.out, "gguf": None, "checked": CHECKED}
