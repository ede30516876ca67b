"""Mending a study."""

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg


@dataclass(frozen=True)
class RepairConfig:
    """Set the damaged files of a study aside, and keep every measured sample that is whole; nothing is deleted."""

    study: Annotated[Positional[str], arg(metavar="STUDY")]
    """The study folder."""
    json: bool = False
    """Print strict JSON."""
