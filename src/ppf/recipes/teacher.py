"""teacher: which model a pruned one learns from again."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ppf.artifact import read_json
from ppf.errors import DamagedError, InputError
from ppf.llm.export import PLAN_FILE
from ppf.llm.load import EMBEDDED, LoadedModel
from ppf.progress import Progress
from ppf.provenance import own_name
from ppf.recipes.lab import load_for


def plan_of(folder: Path) -> dict[str, Any]:
    """What a folder's ``ppf.json`` says; nothing if there is none.

    Raises:
        DamagedError: It is no JSON object.
    """
    path = folder / PLAN_FILE
    plan = read_json(path) if path.is_file() else {}
    try:
        json.dumps(plan, allow_nan=False)
    except ValueError:
        plan = None
    if not isinstance(plan, dict):
        raise DamagedError(f"{path} must be a JSON object of finite numbers; it is not; export the model again")
    return plan


def find_teacher(name: str | None, plan: Mapping[str, Any], progress: Progress) -> LoadedModel | None:
    """The model to learn from.

    Args:
        name: As the user gave it; None takes the one that ``plan`` names, if it names one.
        plan: What ``ppf.json`` says.
        progress: Shows what happens.

    Returns:
        The model; None to learn from the text alone.

    Raises:
        InputError: The plan names one that is not at hand.
        DamagedError: The model of that name is another by now.
    """
    if name is not None:
        return None if name == "none" else load_for(name, progress)
    if "model" not in plan:
        progress.say("no dense model is named; training on the text alone")
        return None
    dense = plan["model"] if isinstance(plan["model"], dict) else {}
    named = str(dense.get("name") or "")
    if named not in EMBEDDED and not os.path.isdir(named) and named.count("/") != 1:
        came = f"{PLAN_FILE} names {named!r}, and no such folder is here"
        raise InputError(f"the dense model must be at hand; {came}; give --teacher MODEL, or none to learn from text alone")
    teacher = load_for(named, progress)
    if teacher.digest != dense.get("digest"):
        raise DamagedError(f"{named} must be the model that was pruned; it is another by now; name the right one with --teacher")
    return teacher


def check_teacher(loaded: LoadedModel, teacher: LoadedModel | None) -> None:
    """Refuses a teacher whose answers are about other tokens.

    Raises:
        InputError: Its vocabulary is another.
    """
    if teacher is None:
        return
    sizes = [one.model.config.vocab_size for one in (loaded, teacher)]
    if sizes[0] != sizes[1] or loaded.tokenizer.get_vocab() != teacher.tokenizer.get_vocab():
        came = f"{own_name(teacher.name)} has {sizes[1]:,} tokens, the model {sizes[0]:,}, or others"
        raise InputError(f"a teacher must have the model's own vocabulary; {came}; give its dense model")
