"""The sections of docs/results.md on what holds and how fast it runs: families, live model, page, measuring, kills.

And the table of docs/reliability.md.
"""

from typing import Any

from page import load, section, table


def families() -> list[str]:
    """What each family's exports differ by from the model in memory."""
    record = load("families")
    if not record:
        return []
    rows = [
        [
            row["model"], row["family"], f"{row['masked']:.0e}", f"{row['reload']:.0e}", f"{row['without_ppf']:.0e}",
            str(row["cache"]), *(f"{row[key]:.0e}" if row[key] is not None else "-" for key in ("gguf", "gguf_alike")),
            str(row["params"]),
        ]
        for row in record["result"]["rows"]
    ]  # fmt: skip
    words = """Tiny random models, pruned to layers that differ. Largest differences of logits: masked from cut, reloaded with
        ppf and without it from the model in memory, GGUF in llama.cpp from transformers, also of half of every layer (- :
        llama.cpp has no architecture for it, or the file would be as large as the dense one); tokens that generation with a
        cache chose otherwise than without; parameters that were counted wrongly."""
    header = ["model", "family", "masked", "reload", "reload without ppf", "cache", "GGUF", "GGUF, layers alike", "parameters"]
    return [section("Every family", "families", record, words, table(header, rows))]


def live() -> list[str]:
    """The live model beside the cut one, and its API."""
    record = load("live")
    if not record:
        return []
    result = record["result"]
    parts = []
    models = {f"ref-a, {dtype}": found for dtype, found in result["ref-a"].items()}
    models |= {f"random, {result['1B']['parameters'] / 1e9:.1f} B": result["1B"]} if "1B" in result else {}
    models |= {f"random, {name}, float32": found for name, found in result.get("fused", {}).items()}
    for name, found in models.items():
        times = [_switching(found, kind) for kind in ("views_ms", "decision_and_views_ms")]
        for ratio, jobs in found["beside_cut"].items():
            beside = [_beside(jobs[job], clock) for job in ("generation", "prompt") for clock in ("wall", "processor")]
            parts.append([name, f"{100 * float(ratio):.0f} %", *times, *beside])
    words = """Milliseconds of a change of the ratio, views alone and with the decision, median (p99). Then the time that the
        elastic model takes over that of the checkpoint cut at the same ratio, so that 1.05 is 5 % slower, run in turns, median
        (quartiles), by the clock on the wall and by the processor's: other work shared the cores. Aim: at most 1.05."""
    header = ["model", "ratio", "switch", "with decision", "generation, wall", "processor", "prompt, wall", "processor"]
    api = [
        [
            where,
            load,
            f"{found['requests_per_second']:.0f}",
            f"{found['milliseconds']['median']:.1f}",
            f"{found['milliseconds']['p99']:.0f}",
        ]
        for where in ("decisions alone", "with a model")
        for load, found in result["api"][where].items()
        if isinstance(found, dict)
    ]
    heads = ["server", "load", "policies/s", "median, ms", "p99, ms"]
    return [section("The live model and its API", "live", record, words, table(header, parts), table(heads, api))]


def busy() -> list[str]:
    """The policy API while other work runs."""
    record = load("load")
    if not record:
        return []
    result, rows = record["result"], []
    names = {"minute": "a minute", "export": "beside `ppf prune`", "fit": "beside `ppf fit`, whose study it serves"}
    for name, words in names.items():
        found = result[name]
        times = [f"{found['milliseconds'][which]:.1f}" for which in ("median", "p99")]
        wrong = f"{found['wrong_masks']} of {found['masks']:,}"
        rows.append([words, f"{found['requests_per_second']:,.0f}", *times, str(found["errors"]), wrong])
    grown = result["minute"]["resident_bytes_grown"]
    words = f"""Policies at 8 connections, every answer compared with the library's. In the minute the server grew by
        {grown / 1e3:,.0f} kB. The new fit was taken into use between two requests."""
    header = ["when", "policies/s", "median, ms", "p99, ms", "errors", "wrong masks"]
    return [section("The policy API beside other work", "load", record, words, table(header, rows))]


def _switching(found: dict[str, Any], kind: str) -> str:
    if "switching" not in found:  # of a family whose speed alone was measured
        return "-"
    times = found["switching"][kind]
    return f"{times['median']:.2f} ({times['p99']:.1f})"


def _beside(found: dict[str, Any], clock: str) -> str:
    ratio = found[clock]["elastic_over_cut"]
    return f"{ratio['median']:.2f} ({ratio['q1']:.2f} to {ratio['q3']:.2f})"


def slider() -> list[str]:
    """How fast the page redraws."""
    record = load("slider")
    if not record:
        return []
    layouts = {name: found for name, found in record["result"].items() if isinstance(found, dict)}
    rows = [
        [
            name,
            str(found["bars"]),
            *(f"{found[kind]['median']:.1f} ({found[kind]['p99']:.0f})" for kind in ("known_ms", "asked_ms")),
        ]
        for name, found in layouts.items()
    ]
    words = f"""{record["result"]["browser"]}, headless. Milliseconds from a move of the slider to the redrawn page, median (p99):
        where the page has asked for that ratio before, as it does in advance, and where it asks the server first."""
    return [section("The page's slider", "slider", record, words, table(["layout", "bars", "known", "asked"], rows))]


def engines() -> list[str]:
    """Measuring on this machine and on a Ray cluster."""
    record = load("ray_engine")
    if not record:
        return []
    result = record["result"]
    rows = []
    for name, found in result["engines"].items():
        each = found["samples_per_second"]
        masks = f"{found['median']:.2f} ({min(each):.2f} to {max(each):.2f})"
        rows.append([name, f"{found['start_seconds']:.0f}", masks, f"{found['share_lost']:.1%}"])
    words = f"""{result["masks"]} masks of {result["search_tokens"]:,} tokens on ref-a, {result["rounds"]} rounds in turns.
        Masks a second, median and range; lost: the share of the workers' time in which none of them measured."""
    header = ["engine, workers", "seconds to start", "masks/s", "lost"]
    return [section("Engines: this machine, and a Ray cluster on it", "ray_engine", record, words, table(header, rows))]


def measuring() -> list[str]:
    """Masks measured beside a plain loop, and what sharing adds."""
    record = load("measuring")
    if not record:
        return []
    parts = []
    for name, found in record["result"]["models"].items():
        shape = f"{name}: {found['layers']} layers, {found['parameters'] / 1e6:.1f} M"
        for clock in ("wall", "processor"):
            plain, *ways = found["ways"].values()
            speeds = [_times(way[clock]["speed_beside"]) for way in (*ways, found["sharing"]["shared"])]
            parts.append([shape, clock, f"{plain[clock]['tokens_per_second']['median']:,.0f}", *speeds])
    words = """One thread, random tokens, all ways in turns: a plain loop over `model(...)` that sums the loss, in tokens/s; then
        masks as a fit measures them, with the divergence from the dense model as well, in speeds of that loop, medians
        (quartiles). One channel gone in the first layer: all the work and nothing to share. 30 % gone: with the weights of the
        narrower model, as on a CPU, and with zeros in the place of what is removed, as on an accelerator. Probes: each site of
        the model halved alone, starting above the layers that it leaves alone, in speeds of the same without sharing."""
    header = ["model", "clock", "loop, tokens/s", "one channel gone", "30 % gone", "30 %, zeros", "probes, shared"]
    tables = [table(header, parts)]
    if "study" in record["result"]:
        shares = [[name, str(one["masks"]), f"{one['left_out']:.1%}"] for name, one in record["result"]["study"].items()]
        tables.append("What the masks of one fit share: how many layers need not be computed, by purpose.")
        tables.append(table(["masks for", "number", "layers left out"], shares))
    return [section("Measuring beside a plain loop", "measuring", record, words, *tables)]


def _times(found: dict[str, float]) -> str:
    return f"{found['median']:.2f} ({found['low']:.2f} to {found['high']:.2f})"


def growth() -> list[str]:
    """What a fit takes as models, texts and budgets grow."""
    record = load("growth")
    if not record:
        return []
    result = record["result"]
    rows = [
        [
            *(f"{row[name]:,}" for name in ("layers", "tokens", "samples")),
            *(f"{row['groups'][name]:.1f}" for name in ("importance", "measuring", "learning")),
            f"{1000 * row['measuring_seconds'] / (row['measured_tokens'] / row['tokens']):.0f}", f"{row['left_out']:.0%}",
        ]
        for row in result["rows"]
    ]  # fmt: skip
    words = f"""Whole fits of random Llamas, {result["hidden_size"]} wide, one worker; from {result["base"]["layers"]} layers,
        {result["base"]["tokens"]:,} tokens and {result["base"]["samples"]} samples one thing grows at a time. Seconds: importance,
        with the choice among criteria; measuring; learning, that is predictors, agents and their search. Then milliseconds of
        a mask, and the layers that sharing left out. In models so narrow the output layer outweighs several others."""
    header = ["layers", "tokens", "samples", "importance, s", "measuring, s", "learning, s", "a mask, ms", "left out"]
    return [section("How the cost of a fit grows", "growth", record, words, table(header, rows))]


def kills() -> list[str]:
    """What a hundred kills cost."""
    record = load("kills")
    if not record:
        return []
    fits, writers = record["result"]["fits"], record["result"]["writers"]
    words = f"""A fit of {fits["samples_of_a_fit"]} masks was killed {fits["kills"]} times at random moments and started again: of
        {fits["acknowledged"]} masks that it had said to be measured {fits["lost"]} were lost, {fits["altered"]} altered and
        {fits["measured_twice"]} measured twice. {fits["finished"]} fits ended in spite of all, {fits["unlike"]} of them unlike one
        that nobody killed.
        Processes that write to one store, two at a time, were killed {writers["killed"]} times: of {writers["acknowledged"]:,}
        acknowledged samples {writers["lost"]} were lost, {writers["twice"]} were there twice, {writers["damaged"]} damaged;
        SQLite's own check says {writers["integrity"]!r}."""
    return [section("Kills", "kills", record, words)]


def coverage() -> list[str]:
    """What the default tests run of the source."""
    record = load("coverage")
    if not record:
        return []
    result = record["result"]
    shares = {name: one["run"] / one["lines"] for name, one in result["files"].items()}
    least = sorted(shares, key=lambda name: shares[name])[:8]
    words = f"""Lines of the source that `make test` runs, in the processes that it starts too. What only slow tests run, or those
        that need an accelerator, llama.cpp, Ray or a browser, counts as not run; so does what runs in a process that a test kills.
        {sum(share == 1 for share in shares.values())} of {len(shares)} files run whole; the least of
        {", ".join(f"`{name}` ({shares[name]:.0%})" for name in least)}."""
    rows = [[name, f"{one['lines']:,}", f"{one['run'] / one['lines']:.1%}"] for name, one in result["parts"].items()]
    return [section("Coverage", "coverage", record, words, table(["part", "lines", "run by the default tests"], rows))]


def campaigns() -> str:
    """What the campaigns of docs/reliability.md counted; empty without their files."""
    record, kills = load("faults"), load("kills")
    if not (record and kills):
        return ""
    result, fits, writers = record["result"], kills["result"]["fits"], kills["result"]["writers"]
    readers = result["fuzz"]["readers"].values()
    fuzz = {name: sum(found[name] for found in readers) for name in ("cases", "refused", "foreign", "silent", "slow")}
    at_calls, errors, hostile = result["kills_at_calls"], result["errors_at_calls"], result["hostile"]
    rows = [
        [
            "kills of a fit",
            f"{fits['kills']}",
            f"{fits['lost']} of {fits['acknowledged']:,} samples lost, {fits['altered']} altered",
        ],
        ["kills of writers", f"{writers['killed']}", f"{writers['lost']} of {writers['acknowledged']:,} samples lost"],
        ["kills at every system call that writes", f"{at_calls['points']}", f"{at_calls['broken']} files or folders broken"],
        [
            "errors at every such call, once and lasting",
            f"{errors['injected']}",
            f"{errors['silent']} silent, {errors['broken']} broken",
        ],
        ["damaged files, for each of the readers", f"{fuzz['cases']:,}", _fuzzed(fuzz, len(readers))],
        *([["files that coverage leads to (Atheris)", *_guided(result["guided"])]] if "guided" in result else []),
        *(
            [f"stores with {words}", f"{result['stores'][kind]['cases']:,}", _kept(result["stores"][kind])]
            for kind, words in _DAMAGES
        ),
        ["beginnings and flipped bits of artefacts", *_all_refused(result["artefacts"])],
        ["hostile configs", *_all_refused(hostile["configs"])],
        ["hostile GGUF files", *_all_refused(hostile["gguf"])],
        ["wrong masks", *_all_refused(hostile["masks"])],
        *([["95 % intervals of a known truth", *_held(result["intervals"])]] if "intervals" in result else []),
    ]
    where = f"`benchmarks/results/faults.json`: `{record['command']}`, seed {record['seed']}, commit {record['commit'][:8]};"
    return "\n".join([f"{where} kills of fits and writers: `kills.json`.\n", table(["campaign", "cases", "outcome"], rows)])


_DAMAGES = (("flip", "a flipped bit"), ("cut", "their end cut off"), ("zeroed", "a zeroed page"))


def _fuzzed(found: dict[str, int], readers: int) -> str:
    bad = f"{found['foreign']} other errors, {found['silent']} altered where a checksum guards, {found['slow']} over 1 s"
    return f"{readers} readers: {found['refused']:,} refused, {bad}"


def _guided(found: dict[str, dict[str, int]]) -> tuple[str, str]:
    seconds, broke = next(iter(found.values()))["seconds"], sum(one["code"] != 0 for one in found.values())
    return f"{sum(one['runs'] for one in found.values()):,}", f"{len(found)} readers, {seconds} s each: {broke} broke"


def _held(found: dict[str, float]) -> tuple[str, str]:
    return f"{found['repeats']:,}", f"{found['alone']:.1%} hold it; of pruned above dense, block by block, {found['paired']:.1%}"


def _kept(found: dict[str, int]) -> str:
    share, sqlite = found["kept"] / found["rows"], found["kept_by_sqlite"] / found["rows"]
    bad = f"{found['altered']} altered, {found.get('foreign', 0)} other errors"
    return f"{share:.1%} of the rows kept (SQLite reads {sqlite:.1%}), {bad}"


def _all_refused(found: dict[str, Any]) -> tuple[str, str]:
    outcomes = {name: found.get(name, 0) for name in ("refused", "read", "foreign")}
    return f"{sum(outcomes.values()):,}", f"{outcomes['refused']:,} refused"
