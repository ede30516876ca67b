"""A study that is fitted anew while it is served: the last fit that was whole answers until the next one is."""

import asyncio
import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ppf.decide import Decider
from ppf.errors import PPFError, ResourceError
from ppf.server.answers import study_record
from ppf.study import Mark, mark_of

_LOOK_SECONDS = 1.0
_PAUSES = (5.0, 60.0)
"""Seconds to wait, at first and at most, before a new fit that the surroundings kept from being opened is tried again."""
_log = logging.getLogger("ppf.server")


def fit_id(mark: Mark | None) -> str:
    """A fit's name for clients, who see by it that another is served."""
    return hashlib.sha256(repr(mark).encode()).hexdigest()[:12]


async def follow(folder: Path, mark: Mark | None, live: bool, adopt: Callable[[Decider, dict[str, Any]], None]) -> None:
    """Looks every second whether another fit has ended, until cancelled.

    Args:
        folder: The study.
        mark: Of the fit that is served.
        live: Whether a model is served too.
        adopt: Takes the decider and the study's record of a new fit into use; runs between two requests.
    """
    wait, pause, is_gone = _LOOK_SECONDS, _PAUSES[0], False
    while True:
        await asyncio.sleep(wait)
        wait = _LOOK_SECONDS
        now, was_gone = mark_of(folder), is_gone
        is_gone = now is None
        if is_gone and not was_gone:
            _log.warning("the study is being fitted or has gone; the policies of its last fit are served until another has ended")
        if is_gone or now == mark:  # or it has come back as it was
            continue
        before, mark = mark, now
        try:
            decider, study, mark = await asyncio.to_thread(_opened, folder, live)
            adopt(decider, study)
        except (ResourceError, MemoryError) as error:  # memory or open files may be there again later
            mark, wait, pause = before, pause, min(2 * pause, _PAUSES[1])
            said = str(error) or "there is not enough memory"
            _log.warning("the study was fitted anew and cannot be opened now; another try in %.3g s: %s", wait, said)
        except PPFError as error:
            _log.warning("the study was fitted anew; the policies of the fit before are still served: %s", error)
        except Exception:  # whatever it is, what is served goes on
            _log.exception("the study was fitted anew and could not be opened; the policies of the fit before are still served")
        else:
            pause = _PAUSES[0]
            _log.warning("the study was fitted anew; its new policies are served from now on")


def _opened(folder: Path, live: bool) -> tuple[Decider, dict[str, Any], Mark | None]:
    decider = Decider(folder)
    return decider, {**study_record(decider, live), "fit": fit_id(decider.mark)}, decider.mark
