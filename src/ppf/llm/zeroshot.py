"""Zero-shot tasks through lm-evaluation-harness, the package that published figures come from.

It is an optional extra of hundreds of megabytes; nothing of it is imported before a task is asked for.
"""

import contextlib
import importlib
import logging
import math
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppf.errors import InputError, ResourceError
from ppf.llm.weights import first_line

_BOOTSTRAP = 1000
"""Draws for the standard errors of metrics that have no formula for theirs, such as perplexity."""


def check_harness() -> None:
    """Refuses tasks at once where the package is missing.

    Raises:
        ResourceError: It is.
    """
    _harness("lm_eval")


def task_names(tasks: str) -> list[str]:
    """The names in a list with commas.

    Raises:
        InputError: There is none, or one twice.
    """
    names = [name.strip() for name in tasks.split(",")]
    if not all(names) or len(set(names)) != len(names):
        raise InputError(f"--tasks must be names with commas between them, each once; {tasks!r} came; try arc_easy,hellaswag")
    return names


def task_manager(names: Sequence[str], include_path: str | None) -> Any:
    """The harness's index of tasks.

    Args:
        names: Which tasks are wanted.
        include_path: A folder of task files (YAML). If it holds all of them, the harness's own tasks are not looked at.

    Raises:
        InputError: No such folder, or no such task.
        ResourceError: The package is missing.
    """
    if include_path is not None and not Path(include_path).is_dir():
        raise InputError(f"--include-path must be a folder of task files; {include_path!r} is none; check the spelling")
    kind, unknown = _harness("lm_eval.tasks").TaskManager, list(names)
    for defaults in (False, True) if include_path is not None else (True,):
        with _quiet():
            manager = kind(include_path=include_path, include_defaults=defaults)
        unknown = [name for name in names if name not in manager.all_tasks]
        if not unknown:
            return manager
    raise InputError(f"--tasks must name tasks of lm-evaluation-harness; {unknown[0]!r} is none; see lm_eval ls tasks")


def zeroshot(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, names: Sequence[str], manager: Any, limit: int | None, batch: int
) -> dict[str, dict[str, tuple[float, float | None]]]:
    """A model on tasks.

    Args:
        model: Where and as precise as it is to be measured.
        tokenizer: Its own.
        names: Of the tasks.
        manager: What ``task_manager`` gave.
        limit: Only so many first items of each; None takes all.
        batch: Sequences that go through the model at once.

    Returns:
        Per task each metric with its standard error; None where the harness gives none. A group of tasks is given as its
        aggregate beside its members.

    Raises:
        InputError: A task that cannot be asked.
        ResourceError: The package, or a task's data, is not at hand.
    """
    harness, wrapper = _harness("lm_eval"), _harness("lm_eval.models.huggingface").HFLM
    try:
        with _quiet():
            wrapped = wrapper(pretrained=model, tokenizer=tokenizer, batch_size=batch)
            found = harness.simple_evaluate(
                model=wrapped, tasks=list(names), task_manager=manager, limit=limit, bootstrap_iters=_BOOTSTRAP, log_samples=False
            )
    except (ConnectionError, OSError) as error:
        came = f"the data of {', '.join(names)} must be at hand; {first_line(error)}"
        raise ResourceError(f"{came}; go online, or give task files by --include-path") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # what wrong task files raise
        raise InputError(f"the tasks {', '.join(names)} must run; {first_line(error)}; mend their files") from error
    return {task: _metrics(result) for task, result in found["results"].items()}


def _metrics(result: dict[str, Any]) -> dict[str, tuple[float, float | None]]:
    """Metrics by name; the harness calls them ``"acc,none"`` and their errors ``"acc_stderr,none"``."""
    metrics = {}
    for key, value in result.items():
        name, _, kind = key.partition(",")
        if kind and not name.endswith("_stderr") and isinstance(value, (int, float)):
            error = result.get(f"{name}_stderr,{kind}")
            label = name if kind == "none" else f"{name} ({kind})"
            metrics[label] = (float(value), float(error) if isinstance(error, (int, float)) and math.isfinite(error) else None)
    return metrics


def _harness(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ResourceError("--tasks needs lm-evaluation-harness; it is missing; pip install 'ppf[eval]'") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Standard output belongs to the answer: what others print goes nowhere, and their log shows errors alone."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        stderr = sys.stderr
        try:
            sys.stderr = nowhere
            yield
        finally:
            sys.stderr = stderr
