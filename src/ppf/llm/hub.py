"""Models of the hub: which commit of one is here, and whether what was fetched is what the hub has."""

import hashlib
import re
import time
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import snapshot_download

from ppf.errors import DamagedError

_FETCHED = ["*.json", "model*.safetensors", "merges.txt", "tokenizer.model", "*.jinja"]


def fetch(name: str, check: Callable[[Path], object]) -> Path:
    """The folder of a hub model in the cache, fetched as far as it is not there.

    Args:
        name: Its id.
        check: Gets a folder with the config alone, before weights are fetched; they are of the same commit.

    Raises:
        DamagedError: A weight file that was fetched now is not the one that the hub has; it is removed from the cache.
        Exception: What the hub's HTTP layer raises.
    """
    config = Path(snapshot_download(name, allow_patterns=["config.json"]))
    check(config)
    start = time.time()
    folder = Path(snapshot_download(name, revision=revision_of(config), allow_patterns=_FETCHED))
    for path in folder.glob("*.safetensors"):
        _check_hash(path, start)
    return folder


def revision_of(folder: Path | None) -> str | None:
    """The commit whose files lie in a folder of the hub's cache; None of any other folder."""
    return folder.name if folder is not None and folder.parent.name == "snapshots" else None


def _check_hash(path: Path, since: float) -> None:
    """The cache calls a large file by the hash that the hub tells of it; what came earlier was compared then."""
    blob = path.resolve()
    if not re.fullmatch("[0-9a-f]{64}", blob.name) or blob.stat().st_mtime < since - 1:
        return
    with open(blob, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() == blob.name:
            return
    blob.unlink()
    raise DamagedError(f"{path.name} must have the hash that the hub tells; another came; fetch it again")
