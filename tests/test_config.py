import dataclasses
import inspect
import math
from typing import get_args

import pytest
import tyro

from builders import refuses
from ppf import cli, config
from ppf.config import (
    DemoConfig,
    EvalConfig,
    ExportConfig,
    FitConfig,
    ModelsConfig,
    PolicyConfig,
    PredictorName,
    PruneConfig,
    RecoverConfig,
    ScoreName,
    ServeConfig,
    Target,
)
from ppf.config.serve import is_loopback
from ppf.errors import InputError

WITH = {"candidates": ["--refine"]}
"""What an option must come with."""
COMMANDS = {
    FitConfig: ["ref-a", "--study", "s"],
    PolicyConfig: ["s", "--ratio", "0.3"],
    PruneConfig: ["s", "--out", "o", "--ratio", "0.3"],
    RecoverConfig: ["d"],
    ExportConfig: ["ref-a", "--gguf", "f"],
    EvalConfig: ["ref-a"],
    ServeConfig: ["s"],
    DemoConfig: [],
    ModelsConfig: [],
}
every = pytest.mark.parametrize("command", COMMANDS)


def parsed(command, *more):
    return tyro.cli(command, args=[*COMMANDS[command], *more])


def flag(field):
    return f"--{field.replace('_', '-')}"


# --- what the user types ---


@every
def test_a_command_without_options_takes_the_defaults(command):
    found = parsed(command)
    for field in dataclasses.fields(command):
        if field.default is not dataclasses.MISSING:
            assert getattr(found, field.name) == field.default


@every
def test_every_option_is_explained(command, capsys):
    with pytest.raises(SystemExit):
        tyro.cli(command, args=["--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    source = " ".join(inspect.getsource(command).split())
    for field in dataclasses.fields(command):
        assert f"{field.name}:" in source
    for line in inspect.getsource(command).splitlines():
        if line.startswith('    """') and line.endswith('"""') and len(line) < 60:
            assert " ".join(line.strip().strip('"').split()) in shown


def test_options_arrive_as_they_were_typed():
    found = parsed(
        FitConfig, "--samples", "50", "--score", "flap", "--max-ratio", "0.5", "--seq-len", "64", "--text", "a.txt", "--seed", "7"
    )
    assert (found.model, found.study, found.samples, found.score, found.text) == ("ref-a", "s", 50, "flap", "a.txt")
    assert (found.max_ratio, found.seq_len, found.seed, found.workers) == (0.5, 64, 7, None)
    prune = parsed(PruneConfig, "--align", "32", "--refine", "--force", "--json")
    assert prune.target == Target(ratio=0.3, align=32) and (prune.refine, prune.force, prune.json) == (True, True, True)


@pytest.mark.parametrize(
    ("option", "value"), [("--score", "hessian"), ("--predictor", "oracle"), ("--dtype", "int8"), ("--samples", "many")]
)
def test_what_is_no_choice_is_refused_by_the_parser(option, value, capsys):
    with pytest.raises(SystemExit) as caught:
        parsed(FitConfig, option, value)
    assert caught.value.code == 2 and option in capsys.readouterr().err


def test_configs_are_values():
    with pytest.raises(dataclasses.FrozenInstanceError):
        FitConfig("ref-a", "s").samples = 3
    assert FitConfig("ref-a", "s") == FitConfig("ref-a", "s") != FitConfig("ref-a", "s", seed=1)
    assert all(kind.__dataclass_params__.frozen for _, kind in inspect.getmembers(config, dataclasses.is_dataclass))


# --- what is checked ---

LEAST = {
    FitConfig: {
        "samples": 20, "seq_len": 8, "calibration_tokens": 1, "search_tokens": 1, "test_tokens": 1, "rounds": 0, "workers": 1,
        "seed": 0,
    },
    PruneConfig: {"candidates": 1},
    RecoverConfig: {"tokens": 1, "lora_rank": 1, "batch": 1, "seq_len": 8, "test_tokens": 1, "seed": 0},
    EvalConfig: {"seq_len": 8, "tokens": 1},
    ServeConfig: {"port": 0, "max_tokens": 1},
}  # fmt: skip
BOUNDS = [(command, field, least) for command, fields in LEAST.items() for field, least in fields.items()]


@pytest.mark.parametrize(("command", "field", "least"), BOUNDS, ids=[f"{command.__name__}.{field}" for command, field, _ in BOUNDS])
def test_counts_have_a_least_value_and_the_flag_is_named(command, field, least, capsys):
    found = parsed(command, flag(field), str(least), *WITH.get(field, ()))
    assert getattr(found, field) == least
    for value in (least - 1, -(10**6)):
        with refuses(InputError) as caught:
            dataclasses.replace(found, **{field: value})
        assert str(caught.value).startswith(f"{flag(field)} must be") and f" {value} " in str(caught.value)
        with pytest.raises(SystemExit) as ended:
            parsed(command, flag(field), str(value))
        assert ended.value.code == InputError.exit_code and flag(field) in capsys.readouterr().err


@pytest.mark.parametrize("value", [0.05, 0, -1, 1, 1.5, math.nan, math.inf])
def test_the_largest_ratio_has_bounds(value):
    with refuses(InputError) as caught:
        FitConfig("ref-a", "s", max_ratio=value)
    assert "--max-ratio" in str(caught.value)
    assert FitConfig("ref-a", "s", max_ratio=0.06).max_ratio == 0.06


@pytest.mark.parametrize(
    "wishes", [{}, {"ratio": 0.3, "params": "3M"}, {"ratio": 0.0, "memory": "1GB"}, {"ratio": 0.1, "params": "3M", "memory": "1GB"}]
)
def test_a_target_is_said_in_exactly_one_way(wishes):
    with refuses(InputError) as caught:
        Target(**wishes)
    assert all(f"--{name}" in str(caught.value) for name in ("ratio", "params", "memory"))
    assert ("none came" in str(caught.value)) is not bool(wishes)


@pytest.mark.parametrize("wish", [{"ratio": 0.0}, {"ratio": 0.5}, {"params": "3M"}, {"params": "1.5B"}, {"memory": "500MiB"}])
def test_one_way_is_enough(wish):
    absent = {"ratio": None, "params": None, "memory": None, "align": None}
    assert dataclasses.asdict(Target(**wish)) == {**absent, "tp": 1, "nested": False, **wish}


@pytest.mark.parametrize(
    "wish",
    [
        {"params": "many"},
        {"params": "-3M"},
        {"params": "0"},
        {"memory": "3M"},
        {"memory": "1"},
        {"ratio": 0.3, "align": 0},
        {"ratio": 0.3, "tp": 0},
    ],
)
def test_a_target_that_says_nothing_is_refused(wish):
    with refuses(InputError):
        Target(**wish)


@pytest.mark.parametrize("lr", [0.0, -1e-3, math.nan, math.inf])
def test_a_learning_rate_is_more_than_nothing(lr):
    with refuses(InputError) as caught:
        RecoverConfig("d", lr=lr)
    assert "--lr" in str(caught.value) and RecoverConfig("d", lr=1e-9).lr == 1e-9


@pytest.mark.parametrize(
    "wish",
    [
        {"port": 65536}, {"ratio": 1.0}, {"ratio": -0.1}, {"ratio": math.nan}, {"min_ratio": 1.0}, {"max_ratio": math.inf},
        {"min_ratio": 0.4, "max_ratio": 0.3}, {"target_latency_ms": 0.0}, {"target_latency_ms": math.nan}, {"target_memory": "3M"},
        {"no_model": True, "ratio": 0.3}, {"no_model": True, "device": "cpu"}, {"min_ratio": 0.2}, {"max_ratio": 0.3},
        {"no_model": True, "target_latency_ms": 5.0}, {"no_model": True, "target_memory": "1GB"}, {"token": "short"},
        {"token": "x" * 22 + "\n"}, {"token": "é" * 22}, {"dtype": "int8"}, {"host": 5},
    ],
)  # fmt: skip
def test_a_server_that_cannot_be_is_refused(wish):
    with refuses(InputError) as caught:
        ServeConfig("s", **wish)
    assert wish.get("token", "no token") not in str(caught.value)


def test_a_server_stays_on_this_machine_by_default_and_a_target_brings_a_controller():
    plain = ServeConfig("s")
    assert is_loopback(plain.host) and not plain.controlled
    assert ServeConfig("s", target_memory="1GB").controlled and ServeConfig("s", target_latency_ms=5.0).controlled
    for host, own in (("127.8.8.8", True), ("::1", True), ("localhost", True), ("10.0.0.1", False), ("::", False), ("box", False)):
        assert is_loopback(host) == own


@pytest.mark.parametrize("value", ["10.0.0.1:6379", "head.example:1", "[::1]:6379"])
def test_a_cluster_has_an_address(value):
    assert FitConfig("ref-a", "s", engine="ray", ray_address=value).ray_address == value


@pytest.mark.parametrize(
    ("wish", "flag"),
    [
        ({"ray_address": "10.0.0.1:6379"}, "--engine ray"),
        ({"gpus_per_worker": 0.5}, "--engine ray"),
        ({"engine": "ray", "ray_address": "auto"}, "--ray-address"),
        ({"engine": "ray", "ray_address": "ray://a:1"}, "--ray-address"),
        ({"engine": "ray", "ray_address": 6379}, "--ray-address"),
        ({"engine": "ray", "gpus_per_worker": 2.0}, "--gpus-per-worker"),
        ({"engine": "ray", "gpus_per_worker": math.nan}, "--gpus-per-worker"),
        ({"engine": "ray", "gpus_per_worker": True}, "--gpus-per-worker"),
        ({"engine": "dask"}, "--engine"),
    ],
)
def test_an_engine_takes_what_is_its_own(wish, flag):
    with refuses(InputError) as caught:
        FitConfig("ref-a", "s", **wish)
    assert flag in str(caught.value)


def test_a_count_that_no_library_takes_is_refused():
    assert FitConfig("ref-a", "s", seed=2**53).seed == 2**53
    for wish in ({"seed": 2**53 + 1}, {"samples": 10**30}):
        with refuses(InputError):
            FitConfig("ref-a", "s", **wish)


PRUNE, EVAL = "prune s --out o", "eval ref-a"
IDLE = [
    f"{PRUNE} --ratio 0.3 --candidates 4", f"{PRUNE} --ratio 0.3 --no-measure --candidates 4",
    f"{PRUNE} --ratio 0.3 --no-measure --device cpu", f"{PRUNE} --ratio 0.3 --no-measure --refine",
    f"{PRUNE} --ratio 0.3 --no-measure --compensate bias", f"{PRUNE} --ratio 0.3 --no-measure --gguf f",
    f"{PRUNE} --ratio 0.3 --quant f16", f"{PRUNE} --ratio 0.3 --text a.txt", f"{PRUNE} --plan p --ratio 0.3",
    f"{PRUNE} --plan p --params 3M", f"{PRUNE} --plan p --memory 9MB", f"{PRUNE} --plan p --nested", f"{PRUNE} --plan p --refine",
    f"{PRUNE} --plan p --candidates 4", f"{PRUNE} --plan p --model m", f"{PRUNE} --plan p --compensate bias",
    f"{PRUNE} --ratio 0.3 --nested --refine",
    f"{EVAL} --against m", f"{EVAL} --limit 9", f"{EVAL} --include-path d", f"{EVAL} --tasks t --text a.txt",
    f"{EVAL} --tasks t --seq-len 64", f"{EVAL} --tasks t --tokens 99",
    *(f"serve s --no-model {flag}" for flag in ("--model m", "--ratio 0.3", "--max-tokens 9", "--device cpu", "--dtype float32")),
    "serve s --no-model --target-memory 9MB", "serve s --min-ratio 0.1", "serve s --max-ratio 0.4",
    "fit m --study s --ray-address a:1", "fit m --study s --gpus-per-worker 1", "recover d --full --lora-rank 8",
    "bench s --methods uniform --candidates 4", "bench s --methods static additive --budget 99",
]  # fmt: skip


@pytest.mark.parametrize("line", IDLE)
def test_no_option_is_silently_without_effect(line, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(line.split()) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and any(word in error for word in line.split() if word.startswith("--") and word != "--out")
    assert error.count("; ") >= 2 and not list(tmp_path.iterdir())


# --- one name, one thing ---


def test_the_scores_to_choose_from_are_those_that_there_are():
    from ppf.llm.scores import SCORES

    assert set(get_args(ScoreName)) == {"auto", *SCORES} and "auto" in get_args(PredictorName)


def test_defaults_pass_their_own_checks():
    assert FitConfig("ref-a", "s").max_ratio < 1 and DemoConfig().samples == FitConfig("ref-a", "s").samples


def test_nested_policies_are_not_refined():
    assert parsed(PruneConfig, "--nested").target.nested
    with refuses(InputError) as caught:
        PruneConfig("study", "out", Target(ratio=0.3, nested=True), refine=True)
    assert "--nested" in str(caught.value)
