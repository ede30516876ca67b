"""What each command can be told. A default lives here once; its docstring is the `--help`."""

import math
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, get_args

from tyro.conf import Positional, arg

from ppf.errors import InputError
from ppf.space.budget import parse_count, parse_size

ScoreName = Literal["auto", "taylor", "flap", "wanda_sp", "magnitude", "random"]
PredictorName = Literal["auto", "corrected", "additive", "cnn"]
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
CompensateName = Literal["none", "bias", "ridge"]
QuantName = Literal["f32", "f16", "bf16", "q8_0", "q4_0", "q4_k_m"]
_BLOCK = 32
"""At other widths a quantised GGUF file falls back to finer types, and llama.cpp is slower than on the dense model."""


def _check_count(flag: str, value: int | None, least: int) -> None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
        raise InputError(f"{flag} must be a whole number; {value!r} came; give one")
    if value is not None and value < least:
        raise InputError(f"{flag} must be at least {least}; {value} came; raise it")


def _check_choice(flag: str, value: str, choices: Any) -> None:
    if value not in get_args(choices):
        raise InputError(f"{flag} must be one of {', '.join(get_args(choices))}; {value!r} came; choose one")


def _check_words(**values: str | None) -> None:
    for name, value in values.items():
        if value is not None and not isinstance(value, str):
            raise InputError(f"{name} must be a string; {value!r} came; convert it")


@dataclass(frozen=True)
class FitConfig:
    """Learn how to prune a model: importance, samples, predictor, agent. Stop it and start it again at any time."""

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """A folder, a hub id, or ref-a, the small model that comes with ppf."""
    study: Annotated[str, arg(metavar="DIR")]
    """The study folder; a started one is continued."""
    text: Annotated[str, arg(metavar="TEXT")] = "pydocs"
    """Text to calibrate and search on: pydocs, self, wikitext2, c4, or a .txt, .jsonl or .parquet file."""
    test_text: Annotated[str | None, arg(metavar="TEXT")] = None
    """Another text for the reported figures; by default a part of TEXT that is used for nothing else."""
    samples: int = 590
    """Masks to measure, the held-out ones included."""
    score: ScoreName = "auto"
    """Importance criterion: the order in which units go inside a layer; auto takes the best of three for each."""
    predictor: PredictorName = "auto"
    """Which predictor decides; auto takes the one that ranks masks of one size best in cross-validation."""
    max_ratio: float = 0.65
    """The agent learns ratios up to this one."""
    seq_len: Annotated[int | None, arg(metavar="N")] = None
    """Tokens a block; by default half of the model's context, 2048 at most."""
    calibration_tokens: int = 16_384
    """Tokens for importance."""
    search_tokens: int = 4096
    """Tokens for each measured mask."""
    validation_tokens: int = 16_384
    """Other tokens, on which static pruning chooses among its best."""
    test_tokens: int = 32_768
    """Tokens for each reported perplexity."""
    rounds: int = 5
    """Rounds of search, measuring and refitting after the first samples."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps; auto takes an accelerator if there is one."""
    dtype: DtypeName = "auto"
    """Precision to measure in; auto is float32 on a CPU and the checkpoint's own elsewhere."""
    workers: Annotated[int | None, arg(metavar="N")] = None
    """Measuring processes on a CPU, one thread each; by default one a core."""
    seed: int = 0
    """Of everything random."""

    def __post_init__(self) -> None:
        _check_count("--samples", self.samples, 20)
        _check_count("--seq-len", self.seq_len, 8)
        _check_count("--calibration-tokens", self.calibration_tokens, 1)
        _check_count("--search-tokens", self.search_tokens, 1)
        _check_count("--validation-tokens", self.validation_tokens, 0)
        _check_count("--test-tokens", self.test_tokens, 1)
        _check_count("--rounds", self.rounds, 0)
        _check_count("--workers", self.workers, 1)
        _check_count("--seed", self.seed, 0)
        _check_choice("--score", self.score, ScoreName)
        _check_choice("--predictor", self.predictor, PredictorName)
        _check_choice("--dtype", self.dtype, DtypeName)
        _check_words(model=self.model, study=self.study, text=self.text, test_text=self.test_text, device=self.device)
        if not (math.isfinite(self.max_ratio) and 0.05 < self.max_ratio < 1):
            raise InputError(f"--max-ratio must lie in (0.05, 1); {self.max_ratio:g} came; 0.65 is usual")


@dataclass(frozen=True)
class Target:
    """How small, in one of three wordings."""

    ratio: Annotated[float | None, arg(metavar="R")] = None
    """Share of the prunable parameters to remove, in [0, 1)."""
    params: Annotated[str | None, arg(metavar="COUNT")] = None
    """Or: parameters that the whole model may keep, such as 3M or 6.5B."""
    memory: Annotated[str | None, arg(metavar="SIZE")] = None
    """Or: size that the weights may have in the checkpoint's dtype, such as 500MiB or 8GB."""
    align: Annotated[int | None, arg(metavar="N")] = None
    """Keep FFN channels in multiples of this (32, 64, 128, 256 suit hardware); by default 1, or 32 with --gguf."""
    tp: Annotated[int, arg(metavar="N")] = 1
    """Keep KV groups and channels in multiples of this, so that tensor parallelism over N devices splits every layer evenly."""
    nested: bool = False
    """Take nested policies: what is gone at one ratio is gone at every larger one (of the same --align and --tp), at the
    price of a little more damage."""

    def __post_init__(self) -> None:
        given = [name for name in ("ratio", "params", "memory") if getattr(self, name) is not None]
        if len(given) != 1 and not (self._may_be_none and not given):
            came = " and ".join(f"--{name}" for name in given) or "none"
            raise InputError(f"exactly one of --ratio, --params and --memory must be given; {came} came; give one")
        _check_count("--align", self.align, 1)
        _check_count("--tp", self.tp, 1)
        _check_words(params=self.params, memory=self.memory)
        if self.params is not None:
            parse_count(self.params)
        if self.memory is not None:
            parse_size(self.memory)

    @property
    def _may_be_none(self) -> bool:
        return False

    @property
    def grid(self) -> tuple[int, int]:
        """``(align, tp)``, as ``allocate`` takes them."""
        return self.align or 1, self.tp


@dataclass(frozen=True)
class PlanTarget(Target):
    """How small, unless a plan says it."""

    @property
    def _may_be_none(self) -> bool:
        return True


@dataclass(frozen=True)
class PolicyConfig:
    """Decide alone, in milliseconds: what stays at each layer. No model is loaded."""

    study: Annotated[Positional[str], arg(metavar="STUDY")]
    """The study folder."""
    target: Annotated[Target, arg(name="")]
    json: bool = False
    """Print strict JSON."""


@dataclass(frozen=True)
class PruneConfig:
    """Cut a smaller checkpoint that loads in transformers, checked before it gets its name."""

    study: Annotated[Positional[str], arg(metavar="STUDY")]
    """The study folder; with --plan a model: a folder, a hub id, or ref-a."""
    out: Annotated[str, arg(metavar="DIR")]
    """The new folder."""
    target: Annotated[PlanTarget, arg(name="")]
    plan: Annotated[str | None, arg(metavar="FILE")] = None
    """Instead of a study: the ppf.json of an export, or pruning ratios a layer (.json, .csv; columns attn, ffn)."""
    text: Annotated[str | None, arg(metavar="TEXT")] = None
    """With --plan: text to calibrate and to measure on, as in fit; by default neither is done."""
    refine: bool = False
    """Static pruning: search on the predictor at this ratio and measure the best few truly."""
    candidates: int = 16
    """How many policies --refine measures."""
    compensate: CompensateName = "none"
    """Make up for what goes: bias adds what it gave on average, ridge fits the weights that read what stays again."""
    force: bool = False
    """Replace an earlier export of that name."""
    model: Annotated[str | None, arg(metavar="MODEL")] = None
    """Where the dense model lies now; by default where it was when the study was fitted."""
    device: str = "auto"
    """As in fit."""
    gguf: Annotated[str | None, arg(metavar="FILE")] = None
    """Also write a GGUF file for llama.cpp, checked like the folder."""
    quant: QuantName | None = None
    """Number type of the GGUF file; by default f16."""
    json: bool = False
    """Print strict JSON."""

    def __post_init__(self) -> None:
        _check_count("--candidates", self.candidates, 1)
        _check_words(plan=self.plan, text=self.text)
        self._check_plan()
        if self.refine and self.target.nested:
            raise InputError("a nested policy must be taken as it comes; --refine and --nested came; leave one out")
        _check_words(gguf=self.gguf)
        _check_choice("--compensate", self.compensate, CompensateName)
        if self.quant is not None:
            _check_choice("--quant", self.quant, QuantName)
            if self.gguf is None:
                raise InputError(f"--quant must come with --gguf FILE; {self.quant} came alone; say where the GGUF file goes")
        if self.gguf is not None and self.target.align is None:
            object.__setattr__(self, "target", replace(self.target, align=_BLOCK))

    def _check_plan(self) -> None:
        """A plan says what goes and needs no study; without one the target must."""
        if self.plan is None:
            object.__setattr__(self, "target", Target(**vars(self.target)))
            if self.text is not None:
                raise InputError("--text must come with --plan; it came alone; a study has its own text")
            return
        wishes = {**vars(self.target), "refine": self.refine, "model": self.model}
        for name in ("ratio", "params", "memory", "nested", "refine", "model"):
            if wishes[name] not in (None, False):
                raise InputError(f"--plan must come without --{name}; both came; the plan says what goes")
        if self.compensate != "none" and self.text is None:
            raise InputError(f"--compensate {self.compensate} must come with --text beside a plan; none came; name a text")


@dataclass(frozen=True)
class ExportConfig:
    """Write a dense or pruned model as one GGUF file for llama.cpp, checked before it gets its name."""

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """A folder (dense or exported), a hub id, or ref-a."""
    gguf: Annotated[str, arg(metavar="FILE")]
    """The new file."""
    quant: QuantName = "f16"
    """Number type of the matrices: f32, f16, bf16, q8_0, q4_0, or q4_k_m, which needs llama-cpp-python."""
    force: bool = False
    """Replace a file of that name."""
    json: bool = False
    """Print strict JSON."""

    def __post_init__(self) -> None:
        _check_words(model=self.model, gguf=self.gguf)
        _check_choice("--quant", self.quant, QuantName)


@dataclass(frozen=True)
class EvalConfig:
    """Perplexity of a model or an exported folder, with its protocol and a 95 % interval; or its answers to tasks."""

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """A folder (dense or exported), a hub id, or ref-a."""
    text: Annotated[str, arg(metavar="TEXT")] = "pydocs"
    """Text: the test part of pydocs, wikitext2 or c4, or a whole .txt, .jsonl or .parquet file."""
    seq_len: Annotated[int | None, arg(metavar="N")] = None
    """Tokens a block; by default half of the model's context, 2048 at most."""
    tokens: Annotated[int | None, arg(metavar="N")] = None
    """Use only so many tokens, spread evenly; by default all."""
    tasks: Annotated[str | None, arg(metavar="NAME,...")] = None
    """Instead of perplexity: tasks of lm-evaluation-harness, such as arc_easy,hellaswag."""
    against: Annotated[str | None, arg(metavar="MODEL")] = None
    """With --tasks: another model, such as the dense one, in a column beside it."""
    limit: Annotated[int | None, arg(metavar="N")] = None
    """With --tasks: only the first so many items of each."""
    include_path: Annotated[str | None, arg(metavar="DIR")] = None
    """With --tasks: a folder of task files that you trust; they may hold code."""
    device: str = "auto"
    """As in fit."""
    dtype: DtypeName = "auto"
    """As in fit."""
    json: bool = False
    """Print strict JSON."""

    def __post_init__(self) -> None:
        _check_count("--seq-len", self.seq_len, 8)
        _check_count("--tokens", self.tokens, 1)
        _check_count("--limit", self.limit, 1)
        _check_choice("--dtype", self.dtype, DtypeName)
        _check_words(tasks=self.tasks, against=self.against, include_path=self.include_path)
        for name in ("against", "limit", "include_path"):
            if self.tasks is None and getattr(self, name) is not None:
                raise InputError(f"--{name.replace('_', '-')} must come with --tasks; it came alone; name tasks")


@dataclass(frozen=True)
class BenchConfig:
    """Compare ways to choose what goes, on test text and at declared costs; several studies of one model are its seeds."""

    studies: Annotated[Positional[tuple[str, ...]], arg(metavar="STUDY...")]
    """Fitted studies of one model, which differ in their seed."""
    out: Annotated[str, arg(metavar="FILE")] = "bench.json"
    """Where the results go."""
    ratios: Annotated[tuple[float, ...], arg(metavar="R...")] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
    """Shares of the prunable parameters to remove."""
    methods: Annotated[tuple[str, ...], arg(metavar="NAME...")] = ()
    """Which ones; by default all."""
    budget: Annotated[int | None, arg(metavar="TOKENS")] = None
    """Tokens that each true search may run through the model at each ratio; by default what the whole fit measured."""
    candidates: int = 16
    """Policies that static pruning measures at each ratio."""
    device: str = "auto"
    """As in fit."""
    workers: Annotated[int | None, arg(metavar="N")] = None
    """As in fit."""

    def __post_init__(self) -> None:
        _check_count("--candidates", self.candidates, 1)
        _check_count("--budget", self.budget, 1)
        _check_count("--workers", self.workers, 1)
        if not self.studies or not self.ratios:
            raise InputError("at least one study and one ratio must be given; none came; give one")


@dataclass(frozen=True)
class DemoConfig:
    """The main job on the embedded model and text: fit, prune at 20, 30 and 50 %, one table."""

    out: Annotated[str, arg(metavar="DIR")] = "runs/demo"
    """The study folder; checkpoints go into it."""
    samples: int = 590
    """As in fit."""
    seed: int = 0
    """As in fit."""
