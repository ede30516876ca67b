"""The command of a study's fit, as far as its files still tell it."""

import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ppf.config import FitConfig
from ppf.errors import PPFError
from ppf.study import is_sealed, read_sealed

_TELLING = ("study.json", "report.json")
_SETTINGS = '"settings":'


def fit_command(folder: Path) -> tuple[str | None, bool]:
    """The command that goes on with a study.

    Args:
        folder: The study; its record may be damaged or set aside.

    Returns:
        The command line, None if nothing says it or the model was an object; and whether a checksum vouches for it.
    """
    settings, sure = _settings(folder)
    try:
        config = FitConfig(**{**settings, "study": str(folder)})
    except (TypeError, PPFError):
        return None, False
    if not config.model:
        return None, False
    return command_of(vars(config)), sure


def command_of(settings: Mapping[str, Any], told: Callable[[str], str] = str) -> str:
    """The command of a fit with these settings; those at their defaults are left out.

    Args:
        settings: By their names in ``FitConfig``.
        told: What is told of a word.
    """
    words = ["ppf", "fit", told(settings.get("model") or "MODEL")]
    for field in fields(FitConfig):
        value, flag = settings.get(field.name), "--" + field.name.replace("_", "-")
        if field.name != "model" and value is not None and value != field.default:
            words += [flag] if value is True else [flag, told(str(value))]
    return shlex.join(words)


def _settings(folder: Path) -> tuple[dict[str, Any], bool]:
    """Of the fit, as its record or its report tells them; or what can still be read of one that is damaged."""
    records = [path for name in _TELLING for path in sorted(folder.glob(f"{name}*"))]
    for path in records:
        try:
            return dict(read_sealed(path)["settings"]), is_sealed(path)
        except (PPFError, KeyError, TypeError, ValueError):
            continue
    for path in records:
        try:
            _, _, rest = path.read_text(encoding="utf-8", errors="replace").partition(_SETTINGS)
            return dict(json.JSONDecoder().raw_decode(rest.lstrip())[0]), False
        except (OSError, ValueError, TypeError, RecursionError):
            continue
    return {}, False
