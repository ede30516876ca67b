"""Training a pruned model."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from ppf.config.checks import check_choice, check_count, check_words, optional
from ppf.errors import InputError

TrainDtypeName = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class RecoverConfig:
    """Train a pruned model to answer as the dense one does again, and write it like an export, with figures before and after."""

    model: Annotated[Positional[str], arg(metavar="DIR")]
    """A pruned folder, or any other model; it stays as it is."""
    out: Annotated[str | None, optional("DIR")] = None
    """The new folder; by default the name of the old one with -recovered behind it."""
    text: Annotated[str, arg(metavar="TEXT")] = "pydocs"
    """Text to train on, as in fit; what fit tests on is left out."""
    test_text: Annotated[str | None, optional("TEXT")] = None
    """Another text for the figures before and after; by default the part of TEXT that is left out."""
    tokens: int = 200_000
    """Tokens to train on; a shorter text is read more than once."""
    teacher: Annotated[str | None, optional("MODEL")] = None
    """The model to learn from; by default the dense one that ppf.json names; none learns from the text alone."""
    lora_rank: Annotated[int | None, optional("R")] = None
    """Rank of the LoRA adapters, which are merged at the end; by default 16."""
    full: bool = False
    """Train all weights in place of adapters."""
    lr: Annotated[float | None, optional("RATE")] = None
    """The highest learning rate; by default by the width of the model."""
    batch: Annotated[int | None, optional("N")] = None
    """Tokens a step; by default so many that there are about 200 steps, 16,384 at most."""
    seq_len: Annotated[int | None, optional("N")] = None
    """Tokens a block; by default half of the model's context, 2048 at most."""
    test_tokens: int = 32_768
    """Tokens for the figures before and after."""
    device: str = "auto"
    """One device, as in fit."""
    dtype: TrainDtypeName = "auto"
    """Precision to compute in; auto is float32 on a CPU and the checkpoint's own elsewhere. Trained weights are float32."""
    seed: int = 0
    """Of the order of the text, and of the adapters."""
    force: bool = False
    """Replace an earlier export of that name."""
    json: bool = False
    """Print strict JSON."""

    def __post_init__(self) -> None:
        for name, least in {"tokens": 1, "lora_rank": 1, "batch": 1, "seq_len": 8, "test_tokens": 1, "seed": 0}.items():
            check_count(f"--{name.replace('_', '-')}", getattr(self, name), least)
        check_choice("--dtype", self.dtype, TrainDtypeName)
        check_words(model=self.model, out=self.out, text=self.text, test_text=self.test_text, teacher=self.teacher)
        check_words(device=self.device)
        if self.full and self.lora_rank is not None:
            raise InputError("--full must come without --lora-rank; both came; leave one out")
        if self.lr is not None and not (math.isfinite(self.lr) and self.lr > 0):
            raise InputError(f"--lr must be more than 0; {self.lr:g} came; 0.001 is usual for small models")
