"""The command line: flags come from the config dataclasses, answers go to standard output, all else to standard error.

Exit codes: 0 done, 2 input, 3 unsupported, 4 damaged, 5 environment, 6 in use, 130 stopped by Ctrl-C.
"""

import contextlib
import io
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import tyro
from tyro.conf import OmitSubcommandPrefixes, subcommand

from ppf.config import BenchConfig, DemoConfig, EvalConfig, ExportConfig, FitConfig, PolicyConfig, PruneConfig
from ppf.errors import InputError, PPFError
from ppf.printing import human_size, print_gguf, print_planned, print_policy, print_table

Command = (
    Annotated[FitConfig, subcommand("fit")]
    | Annotated[PruneConfig, subcommand("prune")]
    | Annotated[PolicyConfig, subcommand("policy")]
    | Annotated[ExportConfig, subcommand("export")]
    | Annotated[EvalConfig, subcommand("eval")]
    | Annotated[BenchConfig, subcommand("bench")]
    | Annotated[DemoConfig, subcommand("demo")]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: Without the program's name; by default those of the process.

    Returns:
        The exit code.
    """
    # Threads that wait in a busy loop make two of them far slower than one on cores that others use too.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    try:
        command = _parse([argument for argument in given if argument != "--debug"])
        if command is not None:
            _run(command, debug)
        return 0
    except PPFError as error:
        return _fail(str(error), error.exit_code, debug)
    except KeyboardInterrupt:
        return _fail("stopped; a fit keeps what it measured; the same command goes on", 130, debug)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return _fail(f"a file or folder must be usable; {error}; check its name and its permissions", 5, debug)
    except (MemoryError, RuntimeError) as error:
        from ppf.llm.perplexity import is_memory

        if not is_memory(error):
            raise
        return _fail("there must be enough memory; there was not; take a smaller --seq-len or --dtype bfloat16", 5, debug)


def _run(command: Any, debug: bool) -> None:
    if not isinstance(command, PolicyConfig) and not debug:
        from ppf.llm.load import quiet_transformers

        quiet_transformers()
    _RUN[type(command)](command)


def _fail(message: str, code: int, debug: bool) -> int:
    if debug:
        import traceback

        traceback.print_exc()
    print(f"error: {message}", file=sys.stderr)
    return code


def _parse(arguments: list[str]) -> Any:
    """The config of the command; None if help or version was printed.

    Raises:
        InputError: Flags that do not exist or do not fit.
    """
    if arguments in (["--version"], ["-V"]):
        import ppf

        print(f"ppf {ppf.__version__}")
        return None
    if not arguments:
        arguments = ["--help"]
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(OmitSubcommandPrefixes[Command], prog="ppf", description=_description(), args=arguments)
    except SystemExit as stop:
        if not stop.code:
            return None
        raise InputError(_one_line(complaint.getvalue(), arguments)) from None


def _description() -> str:
    return "Make a language model smaller, by any ratio; the result loads in transformers. Add --debug for tracebacks."


def _one_line(box: str, arguments: list[str]) -> str:
    """tyro's framed message in one line."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", box)
    words = " ".join(re.sub(r"[╭╮╰╯─│|]+|-{3,}", " ", plain).split())
    for frame in ("Parsing error", "Required options", "Unrecognized options", "Value error", "Invalid input"):
        words = words.removeprefix(f"{frame} ")
    words = re.split(r" For full helptext| Argument helptext| Available subcommands| Perhaps you meant", words)[0].rstrip(". ")
    if own := re.match(r"Error parsing \w*(?:Config|Target): (.*)", words):
        return own[1]
    if number := re.match(r"Error parsing (--[\w-]+): .*from \['?(.*?)'?\]", words):
        words = f"{number[1]} does not take {number[2]!r}"
    command = f" {arguments[0]}" if arguments[0] in ("fit", "prune", "policy", "export", "eval", "bench", "demo") else ""
    return f"the command line must be one that ppf knows; {words}; see ppf{command} --help"


def _fit(config: FitConfig) -> None:
    from ppf.artifact import read_json
    from ppf.progress import Progress
    from ppf.recipes.fit import fit

    study = fit(config, Progress())
    _print_report(read_json(study.folder / "report.json"), config.study)


def _prune(config: PruneConfig) -> None:
    if config.plan is not None:
        return _prune_by_plan(config)
    from ppf.decide import Decider
    from ppf.progress import Progress
    from ppf.recipes.export import check_wish, export_pruned
    from ppf.recipes.lab import load_for
    from ppf.recipes.prune import check_out, dense_bytes, prune

    check_out(config.out, config.force, config.study)
    decider, progress = Decider(config.study), Progress()
    decider.budget(config.target)
    check_wish(config)
    model = decider.study.record["model"]
    loaded = load_for(config.model or model["name"], progress)
    check_wish(config, loaded)
    candidates = config.candidates if config.refine else 0
    pruned = prune(config.study, loaded, config.target, config.device, candidates, progress, config.compensate)
    with progress.stage("writing and checking"):
        size = pruned.save_pretrained(config.out, config.force)
        gguf = export_pruned(config, pruned)
    plan = {
        key: value for key, value in pruned.plan.items() if key not in ("mask", "policy", "report", "layout", "context", "format")
    }
    record = {
        **plan,
        "bytes": {"before": dense_bytes(loaded, model["bytes_per_param"]), "after": size},
        "out": config.out,
        "gguf": gguf,
    }
    _warn_range(record)
    _warn_nothing(config, record)
    if config.json:
        _print_json(record)
    else:
        _print_pruned(record)
    print_gguf(gguf, config.json)


def _prune_by_plan(config: PruneConfig) -> None:
    from ppf.progress import Progress
    from ppf.recipes.apply_plan import prune_by_plan

    print_planned(prune_by_plan(config, Progress()), config.json)


def _policy(config: PolicyConfig) -> None:
    from ppf.decide import Decider

    decider = Decider(config.study)
    record = decider.decide(config.target).to_json(decider.layout)
    _warn_range(record)
    _warn_nothing(config, record)
    if config.json:
        _print_json(record)
    else:
        print_policy(record)


def _export(config: ExportConfig) -> None:
    from ppf.progress import Progress
    from ppf.recipes.export import check_wish, export
    from ppf.recipes.lab import load_for

    check_wish(config)
    progress = Progress()
    loaded = load_for(config.model, progress)
    with progress.stage("writing and checking"):
        record = export(config, loaded)
    if config.json:
        _print_json(record)
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
    if config.json:
        _print_json(record)
    else:
        low, high = record["interval"]
        print(f"perplexity {record['ppl']:.4f}  (95 % {low:.4f} to {high:.4f}), {record['log_ppl']:.6f} nats/token")
        print(", ".join(f"{name} {value}" for name, value in record["protocol"].items()))


def _eval_tasks(config: EvalConfig) -> None:
    from ppf.progress import Progress
    from ppf.recipes.zeroshot import evaluate_tasks, table_of

    record = evaluate_tasks(config, Progress())
    if config.json:
        _print_json(record)
    else:
        print_table(f"tasks, value +- standard error; limit {config.limit or 'none'}", *table_of(record))


def _bench(config: BenchConfig) -> None:
    from pathlib import Path

    from ppf.artifact import write_json
    from ppf.progress import Progress
    from ppf.provenance import provenance
    from ppf.recipes.bench import bench

    result = bench(config, Progress())
    write_json(Path(config.out), {**provenance(), "result": result})
    ratios = [f"{100 * ratio:g} %" for ratio in config.ratios]
    rows = {row["method"]: [row["method"], f"{(row['tokens'] + row['shared_tokens']) / 1e6:.2f} M"] for row in result["rows"]}
    for row in result["rows"]:
        rows[row["method"]].append(f"{row['above']:.4f}{'*' if row['regret'] == 0 else ''}")
    print_table("log-perplexity above dense on the test text, nats/token", ["method", "tokens", *ratios], list(rows.values()))
    print("* the least at its ratio. Tokens run through the model for one ratio, what serves all of them included.")
    print(f"written to {config.out}")


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


_RUN: dict[type, Callable[[Any], None]] = {
    FitConfig: _fit,
    PruneConfig: _prune,
    PolicyConfig: _policy,
    ExportConfig: _export,
    EvalConfig: _eval,
    BenchConfig: _bench,
    DemoConfig: _demo,
}


def _print_json(record: dict[str, Any]) -> None:
    print(json.dumps(record, allow_nan=False))


def _warn_range(record: dict[str, Any]) -> None:
    if not record["in_range"]:
        asked = record["ratio"]["asked"]
        print(f"warning: ratio {asked:.3g} is beyond what the agent was trained on; judge by measuring", file=sys.stderr)


def _warn_nothing(config: PruneConfig | PolicyConfig, record: dict[str, Any]) -> None:
    if config.target.ratio is None and record["ratio"]["asked"] == 0:
        print("warning: nothing is removed; the model is that small already", file=sys.stderr)


def _print_pruned(record: dict[str, Any]) -> None:
    before, after = record["params"]["before"], record["params"]["after"]
    low, high = record["measured"]["interval"]
    speed = record["tokens_per_second"]
    protocol = record["protocol"]
    without = "" if record["compensation"]["method"] == "none" else " without compensation"
    lines = {
        "ratio": f"asked {record['ratio']['asked']:.4f}, met {record['ratio']['met']:.4f} of the prunable parameters",
        "parameters": f"{before:,} -> {after:,}  ({100 * (1 - after / before):.1f} % of all gone)",
        "weights": f"{human_size(record['bytes']['before'])} -> {human_size(record['bytes']['after'])}",
        "perplexity": f"predicted {record['predicted']['ppl']:.2f}{without}, measured {record['measured']['ppl']:.2f} "
        f"(95 % {low:.2f} to {high:.2f}), dense {record['dense']['ppl']:.2f}",
        "protocol": f"{protocol['text']}, {protocol['tokens']:,} tokens in blocks of {protocol['seq_len']}, {protocol['dtype']}",
        "tokens/s": f"{speed['before']:,.0f} -> {speed['after']:,.0f}  (prompt, this machine)",
        "written to": f"{record['out']}  (reloaded and checked)",
    }
    if rounding := record["rounding"]:
        steps = " ".join(f"--{name} {rounding[name]}" for name in ("align", "tp") if rounding[name] > 1)
        lines["perplexity"] += f"; with {steps} predicted {rounding['ppl']:.2f}, without {rounding['unrounded_ppl']:.2f}"
    for name, value in lines.items():
        print(f"{name:<11} {value}")


def _print_report(report: dict[str, Any], study: str) -> None:
    first = next(iter(report["heldout"].values()))
    ratios = " / ".join(f"{100 * float(ratio):.0f}" for ratio in first["tau_within"])
    rows = []
    for kind, found in report["heldout"].items():
        within = " / ".join(f"{value:.2f}" for value in found["tau_within"].values())
        used = "*" if kind == report["predictor"] else ""
        rows.append([kind + used, f"{found['mse']:.2e}", f"{found['mae']:.4f}", f"{found['tau']:.2f}", within, f"{found['z']:.2f}"])
    print_table(
        f"predictors on {first['count']} held-out masks",
        ["predictor", "MSE", "MAE", "tau", f"tau within {ratios} %", "error/std"],
        rows,
    )
    print("* decides. MSE of PPL_dense/PPL, MAE in nats/token, Kendall's tau of the damage: of all, and within a ratio.")
    samples = ", ".join(f"{count} {purpose}" for purpose, count in report["samples"].items())
    tokens = sum(report["tokens"].values())
    lost = f"; {report['damaged']} damaged rows left out" if report["damaged"] else ""
    print(f"samples  {samples}; {report['failed']} failed{lost}; {tokens:,} tokens through the model")
    print("seconds  " + ", ".join(f"{name} {seconds:.1f}" for name, seconds in report["seconds"].items()))
    print(f"next     ppf prune {shlex.quote(study)} --ratio 0.3 --out smaller")
