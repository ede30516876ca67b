"""The folder of a study before there is one: what may lie there, and what is removed when nothing came of it."""

import contextlib
from pathlib import Path

from ppf.artifact import check_room
from ppf.errors import InputError

_LEAST, _LEAST_PER_SAMPLE = 2**16, 512
"""Bytes that any study takes at least."""


def check_study_place(folder: Path) -> None:
    """Refuses a folder that holds anything but a study, before anything is written into it.

    Raises:
        InputError: It holds something else, or is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} must be a folder; a file is there; choose another place")
    if not folder.is_dir() or (folder / "study.json").exists():
        return
    names = {entry.name for entry in folder.iterdir() if not entry.name.startswith(".") and ".damaged" not in entry.name}
    strangers = {name for name in names - {"lock", "text.safetensors"} if not name.startswith("samples.sqlite")}
    if strangers:
        raise InputError(f"{folder} must be a new or a study folder; it holds {min(strangers)!r}; choose another")


def check_study_room(folder: Path, samples: int) -> None:
    """Refuses a disk on which no new study of so many samples can end, before anything is loaded.

    Raises:
        ResourceError: Fewer bytes are free than the smallest model's would take.
    """
    if not (folder / "study.json").exists():
        check_room(folder / "study.json", _LEAST + _LEAST_PER_SAMPLE * samples)


def leave_no_beginning(folder: Path, made: bool) -> None:
    """Removes what a fit wrote before its study had a record, and the folder if the fit made it: there is nothing to go on with."""
    if folder.is_dir() and not (folder / "study.json").exists():
        for name in ("text.safetensors", "lock"):
            (folder / name).unlink(missing_ok=True)
        if made:
            with contextlib.suppress(OSError):  # other hidden files lie there
                folder.rmdir()
