"""zeroshot: tasks of lm-evaluation-harness on one model, or on two side by side."""

from typing import Any

from ppf.config import EvalConfig
from ppf.llm.load import LoadedModel
from ppf.llm.zeroshot import check_harness, task_manager, task_names, zeroshot
from ppf.progress import Progress
from ppf.provenance import own_name
from ppf.recipes.choices import choose_dtype, choose_whole, tokens_per_batch
from ppf.recipes.lab import load_for

_TOKENS_A_SEQUENCE = 128


def evaluate_tasks(config: EvalConfig, progress: Progress) -> dict[str, Any]:
    """``ppf eval MODEL --tasks``.

    Args:
        config: With tasks.
        progress: Shows what happens.

    Returns:
        ``{"models": {name: {task: {metric: {"value", "stderr"}}}}, "protocol"}``: the dense model first, if one was named.

    Raises:
        InputError: No such task, folder or model.
        ResourceError: lm-evaluation-harness is not installed, or a task's data is not at hand.
    """
    check_harness()
    assert config.tasks is not None  # the command line sends others to evaluate
    names = task_names(config.tasks)
    manager = task_manager(names, config.include_path)
    device, found = choose_whole(config.device, "tasks").device, {}
    for role, name in {"against": config.against, "model": config.model}.items():
        if name is not None:
            loaded = load_for(name, progress)
            with progress.stage(f"tasks on {own_name(name)}"):
                found[role] = _answers(loaded, names, manager, config)
    return {
        "models": found,
        "names": {role: name for role, name in {"against": config.against, "model": config.model}.items() if name is not None},
        "protocol": {"limit": config.limit, "dtype": config.dtype, "device": device.type, "fewshot": "as each task says"},
    }


def _answers(loaded: LoadedModel, names: list[str], manager: Any, config: EvalConfig) -> dict[str, Any]:
    where = choose_whole(config.device, "tasks")
    model = loaded.on(where, choose_dtype(config.dtype, where.device, loaded.dtype))
    batch = max(1, tokens_per_batch(where.device) // _TOKENS_A_SEQUENCE)
    found = zeroshot(model, loaded.tokenizer, names, manager, config.limit, batch)
    return {
        task: {metric: {"value": value, "stderr": error} for metric, (value, error) in metrics.items()}
        for task, metrics in found.items()
    }


def table_of(record: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of a table: a row a task and metric, a column a model, each value with its standard error."""
    roles = list(record["models"])
    header = ["task", "metric", *({"against": "dense", "model": "model"}[role] if len(roles) > 1 else role for role in roles)]
    first = record["models"][roles[0]]
    rows = [
        [task, metric, *(_cell(record["models"][role][task][metric]) for role in roles)]
        for task, metrics in first.items()
        for metric in metrics
    ]
    return header, rows


def _cell(found: dict[str, float | None]) -> str:
    value, error = found["value"], found["stderr"]
    return f"{value:.4f}" if error is None else f"{value:.4f} +- {error:.4f}"
