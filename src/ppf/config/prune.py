"""Cutting, and writing in another format."""

from dataclasses import dataclass, replace
from typing import Annotated, get_args

from tyro.conf import Positional, arg

from ppf.config.checks import CompensateName, QuantName, check_choice, check_count, check_idle, check_words, optional
from ppf.config.target import PlanTarget, Target
from ppf.errors import InputError

_BLOCK = 32
"""At other widths a quantised GGUF file falls back to finer types, and llama.cpp is slower than on the dense model."""


@dataclass(frozen=True)
class PruneConfig:
    """Cut a smaller checkpoint that loads in transformers, checked before it gets its name."""

    study: Annotated[Positional[str], arg(metavar="STUDY|MODEL")]
    """The study folder; with --plan a model: a folder, a hub id, or ref-a."""
    out: Annotated[str, arg(metavar="DIR")]
    """The new folder."""
    target: Annotated[PlanTarget, arg(name="")]
    plan: Annotated[str | None, optional("FILE")] = None
    """Instead of a study: the ppf.json of an export, or pruning ratios a layer (.json, .csv; columns attn, ffn)."""
    text: Annotated[str | None, optional("TEXT")] = None
    """With --plan: text to calibrate and to measure on, as in fit; by default neither is done."""
    refine: bool = False
    """Static pruning: search on the predictor at this ratio and measure the best few truly."""
    candidates: int = 16
    """How many policies --refine measures."""
    compensate: CompensateName = "none"
    """Make up for what goes: bias adds what it gave on average, ridge fits the weights that read what stays again."""
    no_measure: bool = False
    """Cut from the weight files, tensor by tensor, without measuring: no model in memory."""
    force: bool = False
    """Replace an earlier export of that name."""
    model: Annotated[str | None, optional("MODEL")] = None
    """Where the dense model lies now; by default where it was when the study was fitted."""
    device: str = "auto"
    """As in fit."""
    gguf: Annotated[str | None, optional("FILE")] = None
    """Also write a GGUF file for llama.cpp, checked like the folder."""
    quant: Annotated[QuantName | None, optional("{" + ",".join(get_args(QuantName)) + "}")] = None
    """Number type of the GGUF file; by default f16."""
    json: bool = False
    """Print strict JSON."""

    def __post_init__(self) -> None:
        check_count("--candidates", self.candidates, 1)
        check_words(plan=self.plan, text=self.text)
        self._check_plan()
        if self.refine and self.target.nested:
            raise InputError("a nested policy must be taken as it comes; --refine and --nested came; leave one out")
        if not self.refine:
            check_idle(self, ("candidates",), "--refine; it came alone")
        self._check_measure()
        check_words(gguf=self.gguf)
        check_choice("--compensate", self.compensate, CompensateName)
        if self.quant is not None:
            check_choice("--quant", self.quant, QuantName)
            if self.gguf is None:
                raise InputError(f"--quant must come with --gguf FILE; {self.quant} came alone; say where the GGUF file goes")
        if self.gguf is not None and self.plan is None and self.target.align is None:
            object.__setattr__(self, "target", replace(self.target, align=_BLOCK))

    @property
    def grid(self) -> tuple[int, int]:
        """``(align, tp)`` for the ratios of a plan; a GGUF file takes blocks unless told otherwise."""
        return self.target.align or (1 if self.gguf is None else _BLOCK), self.target.tp

    def _check_measure(self) -> None:
        """What runs the model cannot go without it."""
        if self.no_measure:
            check_idle(self, ("device",), "measuring; --no-measure came too")
        wishes = {"refine": self.refine, "compensate": self.compensate != "none", "gguf": self.gguf, "text": self.text}
        for name, wish in wishes.items() if self.no_measure else ():
            if wish:
                raise InputError(f"--no-measure must come without --{name}, which runs the model; both came; leave one out")

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
        check_words(model=self.model, gguf=self.gguf)
        check_choice("--quant", self.quant, QuantName)
