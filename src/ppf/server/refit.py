"""A study that is fitted anew while it is served: the last fit that was whole answers until the next one is.

report.json, which a fit takes away first and writes last, tells one fit from another.
"""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ppf.decide import Decider
from ppf.errors import DamagedError, PPFError
from ppf.server.answers import study_record

_LOOK_SECONDS = 1.0
_TRIES = 5
_log = logging.getLogger("ppf.server")
Mark = tuple[int, int, int]


def mark_of(folder: Path) -> Mark | None:
    """What differs between two fits of a study; None while none is whole."""
    try:
        status = (folder / "report.json").stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


def open_whole(folder: str | Path) -> tuple[Decider, Mark | None]:
    """A decider all of which is in memory and of one fit, and the mark of that fit.

    Raises:
        InputError: No fitted study.
        DamagedError: An artefact is not whole, or the study is replaced faster than it can be read.
    """
    for _ in range(_TRIES):
        mark = mark_of(Path(folder))
        decider = Decider(folder)
        _ = decider.chain, decider.report  # read now: later they would be those of another fit
        if mark == mark_of(Path(folder)):
            return decider, mark
    raise DamagedError(f"{folder} must stay as it is while it is read; it changes all the time; try again later")


async def follow(folder: Path, mark: Mark | None, live: bool, adopt: Callable[[Decider, dict[str, Any]], None]) -> None:
    """Looks every second whether another fit has ended, until cancelled.

    Args:
        folder: The study.
        mark: Of the fit that is served.
        live: Whether a model is served too.
        adopt: Takes the decider and the study's record of a new fit into use; runs between two requests.
    """
    while True:
        await asyncio.sleep(_LOOK_SECONDS)
        if (now := mark_of(folder)) == mark:
            continue
        mark = now
        if now is None:
            _log.warning("the study is being fitted or has gone; the policies of its last fit are served until another has ended")
            continue
        try:
            decider, study, mark = await asyncio.to_thread(_opened, folder, live)
            adopt(decider, study)
        except PPFError as error:
            _log.warning("the study was fitted anew; the policies of the fit before are still served: %s", error)
        except Exception:  # whatever it is, what is served goes on
            _log.exception("the study was fitted anew and could not be opened; the policies of the fit before are still served")
        else:
            _log.warning("the study was fitted anew; its new policies are served from now on")


def _opened(folder: Path, live: bool) -> tuple[Decider, dict[str, Any], Mark | None]:
    decider, mark = open_whole(folder)
    return decider, study_record(decider, live), mark
