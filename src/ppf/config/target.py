"""How small, and the command that only decides."""

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg

from ppf.config.checks import check_count, check_words, optional
from ppf.errors import InputError
from ppf.space.budget import parse_count, parse_size


@dataclass(frozen=True)
class Target:
    """How small, in one of three wordings."""

    ratio: Annotated[float | None, optional("R")] = None
    """Share of the prunable parameters to remove, in [0, 1)."""
    params: Annotated[str | None, optional("COUNT")] = None
    """Or: parameters that the whole model may keep, such as 3M or 6.5B."""
    memory: Annotated[str | None, optional("SIZE")] = None
    """Or: size that the weights may have in the checkpoint's dtype, such as 500MiB or 8GB."""
    align: Annotated[int | None, optional("N")] = None
    """Keep FFN channels in multiples of this (32, 64, 128, 256 suit hardware); by default 1, or 32 for a GGUF file."""
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
        check_count("--align", self.align, 1)
        check_count("--tp", self.tp, 1)
        check_words(params=self.params, memory=self.memory)
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
