"""Learning how to prune a model."""

import math
from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg

from ppf.config.checks import (
    DtypeName,
    EngineName,
    PredictorName,
    ScoreName,
    check_address,
    check_choice,
    check_count,
    check_share,
    check_words,
    optional,
)  # fmt: skip
from ppf.errors import InputError


@dataclass(frozen=True)
class FitConfig:
    """Learn how to prune a model: importance, samples, predictor, agent. Stop it and start it again at any time."""

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """A folder, a hub id, or ref-a, the small model that comes with ppf."""
    study: Annotated[str, arg(metavar="DIR")]
    """The study folder; a started one is continued."""
    text: Annotated[str, arg(metavar="TEXT")] = "pydocs"
    """Text to calibrate and search on: pydocs, self, wikitext2, c4, or a .txt, .jsonl or .parquet file."""
    test_text: Annotated[str | None, optional("TEXT")] = None
    """Another text for the reported figures; by default a part of TEXT that is used for nothing else."""
    samples: int = 590
    """Masks to measure, the held-out ones included."""
    score: ScoreName = "auto"
    """Importance criterion: the order in which units go inside a layer; auto takes the best of three for each."""
    predictor: PredictorName = "auto"
    """Which predictor decides; auto takes the one that ranks masks of one size best in cross-validation."""
    max_ratio: float = 0.65
    """The agent learns ratios up to this one."""
    seq_len: Annotated[int | None, optional("N")] = None
    """Tokens a block; by default half of the model's context, 2048 at most."""
    calibration_tokens: int = 16_384
    """Tokens for importance."""
    search_tokens: int = 4096
    """Tokens for each measured mask."""
    validation_tokens: int = 16_384
    """Other tokens, on which static pruning chooses among its best."""
    test_tokens: int = 32_768
    """Tokens for each reported perplexity."""
    depth: bool = False
    """Let whole sub-layers, layers and experts go too: the attention of any layer but the first, any FFN, and any expert of a
    mixture but the one that all tokens see."""
    rounds: int = 5
    """Rounds of search, measuring and refitting after the first samples."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps; auto takes an accelerator if there is one. For a model that is too large, with accelerate:
    0=20GiB,1=20GiB fills these GPUs up to so much, split all that are here, and cpu=8GiB this machine's memory; what does not
    fit is read from the model's files whenever it runs."""
    dtype: DtypeName = "auto"
    """Precision to measure in; auto is float32 on a CPU and the checkpoint's own elsewhere."""
    workers: Annotated[int | None, optional("N")] = None
    """Measuring processes on a CPU, one thread each; by default one a core. On Ray, by default as many as there is room for."""
    engine: EngineName = "local"
    """Where masks are measured: local, on this machine, or ray, on a Ray cluster (pip install 'ppf[ray]')."""
    ray_address: Annotated[str | None, optional("A")] = None
    """With --engine ray: a running cluster, such as 10.0.0.1:6379; by default one is started on this machine."""
    gpus_per_worker: Annotated[float | None, optional("G")] = None
    """With --engine ray: GPUs of each worker, 1 at most; by default none."""
    seed: int = 0
    """Of everything random."""

    def __post_init__(self) -> None:
        check_count("--samples", self.samples, 20)
        check_count("--seq-len", self.seq_len, 8)
        check_count("--calibration-tokens", self.calibration_tokens, 1)
        check_count("--search-tokens", self.search_tokens, 1)
        check_count("--validation-tokens", self.validation_tokens, 0)
        check_count("--test-tokens", self.test_tokens, 1)
        check_count("--rounds", self.rounds, 0)
        check_count("--workers", self.workers, 1)
        check_count("--seed", self.seed, 0)
        check_choice("--score", self.score, ScoreName)
        check_choice("--predictor", self.predictor, PredictorName)
        check_choice("--dtype", self.dtype, DtypeName)
        check_choice("--engine", self.engine, EngineName)
        check_words(model=self.model, study=self.study, text=self.text, test_text=self.test_text, device=self.device)
        check_address("--ray-address", self.ray_address)
        check_share("--gpus-per-worker", self.gpus_per_worker)
        for flag, value in (("--ray-address", self.ray_address), ("--gpus-per-worker", self.gpus_per_worker)):
            if value is not None and self.engine != "ray":
                raise InputError(f"{flag} must come with --engine ray; --engine {self.engine} came; add it or leave {flag} out")
        if not (math.isfinite(self.max_ratio) and 0.05 < self.max_ratio < 1):
            raise InputError(f"--max-ratio must lie in (0.05, 1); {self.max_ratio:g} came; 0.65 is usual")


@dataclass(frozen=True)
class DemoConfig:
    """The main job on the embedded model and text: fit, prune at 20, 30 and 50 %, one table."""

    out: Annotated[str, arg(metavar="DIR")] = "runs/demo"
    """The study folder; checkpoints go into it."""
    samples: int = 590
    """As in fit."""
    seed: int = 0
    """As in fit."""
