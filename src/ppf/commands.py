"""What each command does: runs a recipe and prints its record. Heavy imports sit in the commands that need them."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from ppf.config import (
    BenchConfig,
    DemoConfig,
    EvalConfig,
    ExportConfig,
    FitConfig,
    ModelsConfig,
    PolicyConfig,
    PruneConfig,
    RecoverConfig,
    RepairConfig,
    ReportConfig,
    ServeConfig,
)
from ppf.errors import InputError
from ppf.printing import (
    human_size,
    print_evaluated,
    print_families,
    print_gguf,
    print_json,
    print_planned,
    print_policy,
    print_pruned,
    print_recovered,
    print_repaired,
    print_report,
    print_table,
    warn_missed,
    warn_nothing,
    warn_range,
)


def check_places(config: Any) -> None:
    """Refuses what cannot be written before a command imports what takes seconds.

    Raises:
        ResourceError: The place of the study or of the output is read only, or its disk full.
        InputError: It lies below a file.
    """
    from pathlib import Path

    from ppf.artifact import check_writable
    from ppf.recipes.places import check_study_room

    if isinstance(config, FitConfig):
        check_writable(Path(config.study) / "lock")
        check_study_room(Path(config.study), config.samples)
    for place in (getattr(config, "out", None), getattr(config, "gguf", None)):
        if place is not None:
            check_writable(Path(place))


def _fit(config: FitConfig) -> None:
    from ppf.decide import missed_by
    from ppf.progress import Progress
    from ppf.recipes.fit import fit

    study = fit(config, Progress())
    report = study.report
    print_report(report, config.study)
    warn_missed(missed_by(report))


def _prune(config: PruneConfig) -> None:
    if config.plan is not None:
        return _prune_by_plan(config)
    from pathlib import Path

    from ppf.artifact import check_room
    from ppf.decide import Decider
    from ppf.llm.export import CHECKED
    from ppf.progress import Progress
    from ppf.recipes.export import check_wish, export_pruned
    from ppf.recipes.lab import load_for
    from ppf.recipes.prune import check_out, dense_bytes, prune
    from ppf.recipes.prune_files import prune_stored

    check_out(config.out, config.force, config.study)
    decider, progress = Decider(config.study), Progress()
    model = decider.study.record["model"]
    decision = decider.decide(config.target)
    check_room(Path(config.out), int(decision.params[1] * model["bytes_per_param"]))
    check_wish(config)
    if config.no_measure:
        return _print_pruned(config, decider, prune_stored(config, config.model or model["name"], progress))
    loaded = load_for(config.model or model["name"], progress)
    check_wish(config, loaded, None if config.refine else (decider.layout, decision.allocation))
    candidates = config.candidates if config.refine else 0
    pruned = prune(config.study, loaded, config.target, config.device, candidates, progress, config.compensate)
    with progress.stage("writing and checking"):
        size = pruned.save_pretrained(config.out, config.force)
        gguf = export_pruned(config, pruned)
    weights = {"before": dense_bytes(loaded, model["bytes_per_param"]), "after": size}
    _print_pruned(config, decider, {**pruned.plan, "bytes": weights, "out": config.out, "gguf": gguf, "checked": CHECKED})


def _print_pruned(config: PruneConfig, decider: Any, whole: dict[str, Any]) -> None:
    record = {key: whole[key] for key in whole if key not in ("mask", "policy", "report", "layout", "context", "format")}
    _warn(config, decider, record)
    _print(config, record, print_pruned)
    print_gguf(record["gguf"], config.json)


def _warn(config: PruneConfig | PolicyConfig, decider: Any, record: dict[str, Any]) -> None:
    """What may be wrong with a decision."""
    warn_range(record)
    warn_nothing(config.target, record)
    warn_missed(decider.missed_by)


def _print(config: Any, record: dict[str, Any], show: Callable[[dict[str, Any]], None]) -> None:
    """A record as JSON where that is asked for, else as people read it."""
    if config.json:
        print_json(record)
    else:
        show(record)


def _prune_by_plan(config: PruneConfig) -> None:
    from ppf.progress import Progress
    from ppf.recipes.apply_plan import prune_by_plan

    print_planned(prune_by_plan(config, Progress()), config.json)


def _policy(config: PolicyConfig) -> None:
    from ppf.decide import Decider

    decider = Decider(config.study)
    record = decider.decide(config.target).to_json(decider.layout) | {"rounding": decider.rounding(config.target)}
    _warn(config, decider, record)
    _print(config, record, print_policy)


def _recover(config: RecoverConfig) -> None:
    from ppf.progress import Progress
    from ppf.recipes.recover import recover_folder

    _print(config, recover_folder(config, Progress()), print_recovered)


def _export(config: ExportConfig) -> None:
    from ppf.progress import Progress
    from ppf.recipes.export import check_wish, export
    from ppf.recipes.prune_files import open_stored

    check_wish(config)
    progress = Progress()
    source = open_stored(config.model, progress)
    with progress.stage("writing and checking"):
        record = export(config, source)
    if config.json:
        print_json(record)
    print_gguf(record, config.json)


def _eval(config: EvalConfig) -> None:
    if config.tasks is not None:
        return _eval_tasks(config)
    from ppf.progress import Progress
    from ppf.recipes.evaluate import evaluate
    from ppf.recipes.lab import load_for

    progress = Progress()
    loaded = load_for(config.model, progress)
    with progress.stage("measuring"):
        record = evaluate(config, loaded)
    _print(config, record, print_evaluated)


def _eval_tasks(config: EvalConfig) -> None:
    from ppf.progress import Progress
    from ppf.recipes.zeroshot import evaluate_tasks, table_of

    title = f"tasks, value +- standard error; limit {config.limit or 'none'}"
    _print(config, evaluate_tasks(config, Progress()), lambda record: print_table(title, *table_of(record)))


def _bench(config: BenchConfig) -> None:
    from pathlib import Path

    from ppf.artifact import check_writable, write_json
    from ppf.progress import Progress
    from ppf.provenance import provenance
    from ppf.recipes.bench import bench

    out = Path(config.out)
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise InputError(f"--out must name a file in a folder that exists; {out} came; choose another name")
    check_writable(out)
    result = bench(config, Progress())
    write_json(out, {**provenance(), "result": result})
    ratios = [f"{100 * ratio:g} %" for ratio in config.ratios]
    rows = {row["method"]: [row["method"], f"{(row['tokens'] + row['shared_tokens']) / 1e6:.2f} M"] for row in result["rows"]}
    for row in result["rows"]:
        rows[row["method"]].append(f"{row['above']:.4f}{'*' if row['regret'] == 0 else ''}")
    print_table("log-perplexity above dense on the test text, nats/token", ["method", "tokens", *ratios], list(rows.values()))
    print("* the least at its ratio. Tokens run through the model for one ratio, what serves all of them included.")
    print(f"written to {config.out}")


def _report(config: ReportConfig) -> None:
    from ppf.report import write_report

    out = write_report(config)
    print(f"written to {out}  ({human_size(out.stat().st_size)}, opens in any browser, offline)")


def _repair(config: RepairConfig) -> None:
    from pathlib import Path

    from ppf.repair import repair

    _print(config, repair(Path(config.study)), print_repaired)


def _serve(config: ServeConfig) -> None:
    try:
        from ppf.server.run import serve
    except ModuleNotFoundError as error:
        from ppf.errors import ResourceError

        raise ResourceError(f"serving needs {error.name}; it is not installed; pip install 'ppf[serve]'") from error
    serve(config, None if config.no_model else _open_served)


def _open_served(config: ServeConfig, decider: Any) -> Any:
    from ppf.server.served import open_served

    return open_served(config, decider)


def _demo(config: DemoConfig) -> None:
    from ppf.progress import Progress
    from ppf.recipes.demo import demo

    rows = demo(config, Progress())
    print_table(
        f"ref-a on the pydocs test text, dense perplexity {rows[0]['dense']:.2f}",
        ["ratio", "predicted", "measured", "uniform", "parameters", "file", "folder"],
        [
            [
                f"{100 * row['ratio']:.1f} %", f"{row['predicted']:.2f}", f"{row['measured']:.2f}", f"{row['uniform']:.2f}",
                f"{row['params']:,}", human_size(row["bytes"]), row["folder"],
            ]
            for row in rows
        ],
    )  # fmt: skip


def _models(config: ModelsConfig) -> None:
    from ppf.llm.families import supported

    _print(config, {"families": [asdict(one) for one in supported()]}, print_families)


COMMANDS: dict[str, tuple[type, Callable[[Any], None]]] = {
    "fit": (FitConfig, _fit),
    "prune": (PruneConfig, _prune),
    "policy": (PolicyConfig, _policy),
    "recover": (RecoverConfig, _recover),
    "export": (ExportConfig, _export),
    "eval": (EvalConfig, _eval),
    "bench": (BenchConfig, _bench),
    "report": (ReportConfig, _report),
    "repair": (RepairConfig, _repair),
    "serve": (ServeConfig, _serve),
    "demo": (DemoConfig, _demo),
    "models": (ModelsConfig, _models),
}
"""By name: the config that its flags make, and what it does with it."""
