"""Measuring models and comparing methods."""

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg

from ppf.config.checks import DtypeName, check_choice, check_count, check_idle, check_words, optional
from ppf.errors import InputError


@dataclass(frozen=True)
class EvalConfig:
    """Perplexity of a model or an exported folder, with its protocol and a 95 % interval; or its answers to tasks."""

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """A folder (dense or exported), a hub id, or ref-a."""
    text: Annotated[str, arg(metavar="TEXT")] = "pydocs"
    """Text: the test part of pydocs, wikitext2 or c4, or a whole .txt, .jsonl or .parquet file."""
    seq_len: Annotated[int | None, optional("N")] = None
    """Tokens a block; by default half of the model's context, 2048 at most."""
    tokens: Annotated[int | None, optional("N")] = None
    """Use only so many tokens, spread evenly; by default all."""
    tasks: Annotated[str | None, optional("NAME,...")] = None
    """Instead of perplexity: tasks of lm-evaluation-harness, such as arc_easy,hellaswag."""
    against: Annotated[str | None, optional("MODEL")] = None
    """With --tasks: another model, such as the dense one, in a column beside it."""
    limit: Annotated[int | None, optional("N")] = None
    """With --tasks: only the first so many items of each."""
    include_path: Annotated[str | None, optional("DIR")] = None
    """With --tasks: a folder of task files that you trust; they may hold code."""
    device: str = "auto"
    """As in fit."""
    dtype: DtypeName = "auto"
    """As in fit."""
    json: bool = False
    """Print strict JSON."""

    def __post_init__(self) -> None:
        check_count("--seq-len", self.seq_len, 8)
        check_count("--tokens", self.tokens, 1)
        check_count("--limit", self.limit, 1)
        check_choice("--dtype", self.dtype, DtypeName)
        check_words(tasks=self.tasks, against=self.against, include_path=self.include_path)
        if self.tasks is None:
            check_idle(self, ("against", "limit", "include_path"), "--tasks; it came alone")
        else:
            check_idle(self, ("text", "seq_len", "tokens"), "perplexity; --tasks came, which bring their own text")


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
    """Which ones; by default all: uniform, owl, alpha_pruning, flap, global_ranking, depth; wanda_sp and flap_own_order with an
    order of their own; additive; random, evolution and cma, which measure, and the same with _on_predictor; nested, dynamic,
    static."""
    budget: Annotated[int | None, optional("TOKENS")] = None
    """Tokens that each true search may run through the model at each ratio; by default what the whole fit measured."""
    candidates: int = 16
    """Policies that static pruning measures at each ratio."""
    device: str = "auto"
    """As in fit."""
    workers: Annotated[int | None, optional("N")] = None
    """As in fit."""

    def __post_init__(self) -> None:
        check_count("--candidates", self.candidates, 1)
        check_count("--budget", self.budget, 1)
        check_count("--workers", self.workers, 1)
        if not self.studies or not self.ratios:
            raise InputError("at least one study and one ratio must be given; none came; give one")
