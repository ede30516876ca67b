"""Checks that the configs share: what must hold, what came, what to do. And the names to choose among."""

import re
from dataclasses import fields
from typing import Any, Literal, get_args

from tyro.conf import arg

from ppf.errors import InputError

ScoreName = Literal["auto", "taylor", "flap", "wanda_sp", "magnitude", "random"]
PredictorName = Literal["auto", "corrected", "additive", "cnn"]
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
CompensateName = Literal["none", "bias", "ridge"]
EngineName = Literal["local", "ray"]
QuantName = Literal["f32", "f16", "bf16", "q8_0", "q4_0", "q4_k_m"]


MOST = 2**53
"""Whole numbers up to here are exact as floats too, and are seeds that every library takes."""


def check_count(flag: str, value: int | None, least: int) -> None:
    """Refuses what is no whole number, less than ``least`` or more than ``MOST``; None is no value at all."""
    if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
        raise InputError(f"{flag} must be a whole number; {value!r} came; give one")
    if value is not None and value < least:
        raise InputError(f"{flag} must be at least {least}; {value} came; raise it")
    if value is not None and value > MOST:
        raise InputError(f"{flag} must be at most {MOST}; {value} came; lower it")


def check_choice(flag: str, value: str, choices: Any) -> None:
    """Refuses what is none of the names of a ``Literal``."""
    if value not in get_args(choices):
        raise InputError(f"{flag} must be one of {', '.join(get_args(choices))}; {value!r} came; choose one")


def check_share(flag: str, value: float | None) -> None:
    """Refuses what is no number in [0, 1]; None is no value at all."""
    if value is not None and (not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1):
        raise InputError(f"{flag} must be a number in [0, 1]; {value!r} came; give one")


def check_address(flag: str, value: str | None) -> None:
    """Refuses what is no ``HOST:PORT``; None is no value at all."""
    if value is not None and not re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[^\s:/]+):\d{1,5}", str(value)):
        raise InputError(f"{flag} must be HOST:PORT; {value!r} came; ray status prints it")


def check_idle(config: Any, names: tuple[str, ...], needs: str) -> None:
    """Refuses options that would do nothing beside others.

    Args:
        config: Whose options.
        names: Those without effect, which must be as by default.
        needs: With what they must come, and what came.
    """
    for field in fields(config):
        if field.name in names and getattr(config, field.name) != field.default:
            raise InputError(f"--{field.name.replace('_', '-')} must come with {needs}; leave it out")


def check_words(**values: str | None) -> None:
    """Refuses what is neither a string nor None."""
    for name, value in values.items():
        if value is not None and not isinstance(value, str):
            raise InputError(f"{name} must be a string; {value!r} came; convert it")


def optional(metavar: str) -> Any:
    """How --help shows an option without a default value; its text says what its absence means."""
    return arg(metavar=metavar, help_behavior_hint="")
