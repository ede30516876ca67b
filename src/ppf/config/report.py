"""Showing what a study learnt."""

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg

from ppf.config.checks import check_words


@dataclass(frozen=True)
class ReportConfig:
    """One HTML file about a study, which needs nothing else: what stays, what it costs, how well it was predicted."""

    study: Annotated[Positional[str], arg(metavar="STUDY")]
    """The study folder."""
    out: Annotated[str, arg(metavar="FILE")] = "report.html"
    """Where the report goes; an older one is replaced."""
    bench: Annotated[tuple[str, ...], arg(metavar="FILE...")] = ()
    """Tables to show as well: files that ppf bench wrote. What it left in the study is shown anyway."""

    def __post_init__(self) -> None:
        check_words(study=self.study, out=self.out)
