"""Sample and SampleStore: what was measured of which mask, kept so that nothing measured is ever lost.

SQLite in WAL mode with full synchronisation, one transaction a sample, a CRC a row. A row whose CRC does not match is
treated as not measured. The store has one writer; readers may come and go. On a network disk, whose machines share no memory,
there is no WAL.
"""

import json
import math
import os
import sqlite3
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from ppf.errors import MEND, DamagedError, InUseError, NewerError, ResourceError
from ppf.lock import network_disk
from ppf.space.layout import Layout
from ppf.space.mask import Mask

_SCHEMA = """
CREATE TABLE IF NOT EXISTS samples (
    context TEXT NOT NULL, digest TEXT NOT NULL, purpose TEXT NOT NULL, ratio REAL NOT NULL, kept TEXT NOT NULL,
    mask BLOB NOT NULL, status TEXT NOT NULL, reason TEXT NOT NULL, log_ppl REAL, kl REAL, tokens INTEGER NOT NULL,
    seconds REAL NOT NULL, round INTEGER NOT NULL, crc INTEGER NOT NULL, UNIQUE (context, digest))
"""


@dataclass(frozen=True)
class Sample:
    """One mask and what measuring it gave.

    Attributes:
        context: Hash of model, text and settings; samples of different contexts never mix.
        digest: The mask's hash.
        purpose: ``"probe"``, ``"spread"``, ``"search"``, ``"heldout"`` or ``"refine"``.
        ratio: Nominal pruning ratio of its group; masks of one group have one size.
        kept: Units kept per site.
        mask: Packed bits.
        status: ``"done"`` or ``"failed"``.
        reason: Why it failed; empty when done.
        log_ppl: Log-perplexity of the masked model, nats/token.
        kl: KL divergence of the dense model from the masked one, nats/token.
        tokens: Tokens run through the model.
        seconds: Time that it took.
        round: In which round of sampling it was chosen; 0 is before any predictor.
    """

    context: str
    digest: str
    purpose: str
    ratio: float
    kept: tuple[int, ...]
    mask: bytes
    status: str
    reason: str
    log_ppl: float
    kl: float
    tokens: int
    seconds: float
    round: int = 0

    @classmethod
    def of(cls, mask: Mask, context: str, purpose: str, ratio: float, round: int, result: "Measurement") -> "Sample":
        """A finished measurement of a mask; a non-finite one becomes a failed sample with its reason."""
        done = not result.reason and math.isfinite(result.log_ppl) and math.isfinite(result.kl)
        return cls(
            context,
            mask.digest,
            purpose,
            float(ratio),
            tuple(int(kept) for kept in mask.allocation.kept),
            mask.pack(),
            "done" if done else "failed",
            "" if done else result.reason or f"not finite: log-perplexity {result.log_ppl}, KL {result.kl}",
            float(result.log_ppl) if done else 0.0,
            float(result.kl) if done else 0.0,
            int(result.tokens),
            float(result.seconds),
            int(round),
        )


@dataclass(frozen=True)
class Measurement:
    """What one run of a masked model gives.

    Attributes:
        log_ppl: Nats/token.
        kl: Nats/token; 0 for the dense model.
        tokens: Tokens run through the model.
        seconds: Wall time.
        reason: Why there is no number; empty when there is one.
        losses: Log-perplexity of each block, in the order of the text.
        divergences: KL divergence of each block.
    """

    log_ppl: float
    kl: float
    tokens: int
    seconds: float
    reason: str = ""
    losses: tuple[float, ...] = ()
    divergences: tuple[float, ...] = ()


_FIELDS = tuple(field.name for field in fields(Sample))
_AS_STORED: dict[Any, Callable[[Any], Any]] = {
    str: lambda text: text.encode(errors="backslashreplace").decode(),
    bytes: bytes,
    int: int,
    float: lambda number: float(number) + 0.0,  # SQLite has no minus zero
    tuple[int, ...]: lambda numbers: json.dumps([int(number) for number in numbers]),
}
REALS = {index for index, field in enumerate(fields(Sample)) if field.type is float}
"""Columns of real numbers, by their place."""
STORE_VERSION = 1
"""To be raised when an older ppf could not read the file; files of before it was kept say 0 and are alike."""
_PREPARE = ("PRAGMA synchronous=FULL", _SCHEMA)
_PATIENCE = 30.0
"""Seconds to wait for another who writes; SQLite asks ten times a second, and one who writes all the time leaves few gaps."""
_BUSY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}
_SURROUNDINGS = {sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_PERM, sqlite3.SQLITE_READONLY}


class SampleStore:
    """Samples of one context in one file, one a mask; none is removed, and only a new one of the same mask replaces it.

    Args:
        path: The SQLite file.
        context: Which samples are meant; others in the file are not seen.
        write: Open for writing; readers never create or change the file.
    """

    def __init__(self, path: Path, context: str, write: bool = False) -> None:
        self.path, self.context, self.damaged = Path(path), context, 0
        with _translated(self.path), ExitStack() as on_error:
            if not write and not self.path.exists():
                raise DamagedError(f"{path} must exist; it does not; fit the study first")
            mode = "rwc" if write else "ro"
            if not write and not os.access(self.path.parent, os.W_OK) and _is_resting(self.path):
                mode += "&immutable=1"  # else SQLite would make files beside it, which no disk that is read only takes
            self._db = _connected(self.path, mode)
            on_error.callback(self._db.close)
            # A text that is damaged comes back altered, not as an error, so that it costs its own row only.
            self._db.text_factory = lambda raw: raw.decode(errors="surrogateescape")
            version = self._version()
            if write:
                self._prepare(version)
            self._db.execute("SELECT 1 FROM samples LIMIT 1")
            on_error.pop_all()

    def _prepare(self, version: int) -> None:
        """Makes the table, or finds it made. Where two make a store at once, SQLite refuses one of them without waiting."""
        mode = "DELETE" if network_disk(self.path.parent) else "WAL"
        last = [f"PRAGMA user_version={STORE_VERSION}"] if version < STORE_VERSION else []
        statements = [f"PRAGMA journal_mode={mode}", *_PREPARE, *last]
        until = time.monotonic() + _PATIENCE
        while statements:
            try:
                self._db.execute(statements[0])
                del statements[0]
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF not in _BUSY or time.monotonic() > until:
                    raise
                time.sleep(0.01)

    def add(self, sample: Sample) -> None:
        """Commits one sample; an earlier one of the same mask is replaced.

        Raises:
            ResourceError: It could not be written.
            InUseError: Another process is writing.
        """
        row = [_AS_STORED[field.type](getattr(sample, field.name)) for field in fields(Sample)]
        marks = ", ".join("?" * (len(row) + 1))
        with _translated(self.path):
            insert = f"INSERT OR REPLACE INTO samples ({', '.join(_FIELDS)}, crc) VALUES ({marks})"  # noqa: S608 (column names)
            self._db.execute(insert, [*row, _crc(row)])

    def get(self, digest: str) -> Sample | None:
        """The sample of one mask, or None if it was not measured."""
        return next(self._rows("AND digest = ?", digest), None)

    def all(self, *purposes: str) -> list[Sample]:
        """Finished samples in the order in which they were measured.

        Args:
            *purposes: Only these; none means all.
        """
        return [sample for sample in self._rows("") if sample.status == "done" and (not purposes or sample.purpose in purposes)]

    def failed(self) -> list[Sample]:
        """Samples that gave no number, with their reasons."""
        return [sample for sample in self._rows("") if sample.status == "failed"]

    def damage(self) -> tuple[str, int]:
        """What is wrong with the file, rows of all contexts included, empty if nothing is; and how many samples are whole.

        Raises:
            DamagedError: It cannot be read to its end.
        """
        with _translated(self.path):
            (found,) = self._db.execute("PRAGMA integrity_check(1)").fetchone()
            rows = self._db.execute(f"SELECT {', '.join(_FIELDS)}, crc FROM samples").fetchall()  # noqa: S608 (ours)
        whole = sum(whole_row(row) is not None for row in rows)
        altered = len(rows) - whole
        wrong = "" if found == "ok" else " ".join(str(found).split())[:100]
        return wrong or (f"{altered} rows are altered" if altered else ""), whole

    def close(self) -> None:
        """Gives the file back."""
        self._db.close()

    def _version(self) -> int:
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version > STORE_VERSION:
            what = f"{self.path} must be a sample store of version {STORE_VERSION} or older"
            raise NewerError(f"{what}; it is of version {version}; use the newer ppf that made it")
        return version

    def _rows(self, where: str, *values: str) -> Iterator[Sample]:
        query = f"SELECT {', '.join(_FIELDS)}, crc FROM samples WHERE context = ? {where} ORDER BY rowid"  # noqa: S608 (ours)
        with _translated(self.path), closing(self._db.execute(query, (self.context, *values))) as cursor:
            rows = cursor.fetchall()
        self.damaged = 0
        for row in rows:
            sample = whole_row(row)
            if sample is None:
                self.damaged += 1
            else:
                yield sample


def roll_back(path: Path) -> None:
    """Undoes a write of a store that was cut off. The caller must be its one writer.

    Raises:
        DamagedError: It is not whole.
        ResourceError: It cannot be written.
    """
    with _translated(path), closing(_connected(path, "rw")) as db:
        db.execute("SELECT 1 FROM sqlite_master LIMIT 1")  # SQLite rolls back before it reads


def kept_matrix(samples: list[Sample], layout: Layout) -> np.ndarray:
    """Int[N, S]: kept units of many samples.

    Raises:
        DamagedError: A sample of another model.
    """
    if any(len(sample.kept) != len(layout.sites) for sample in samples):
        raise DamagedError("samples must have the sites of this model; some have others; fit again in a new study")
    return np.array([sample.kept for sample in samples], dtype=np.int64).reshape(len(samples), len(layout.sites))


def whole_row(row: Sequence[Any]) -> Sample | None:
    """The sample of a row and its CRC; None if they do not fit each other."""
    *values, crc = row
    try:
        if _crc(values) != crc:
            return None
        record = dict(zip(_FIELDS, values, strict=True))
        return Sample(**{**record, "kept": tuple(json.loads(record["kept"]))})
    except (TypeError, ValueError):
        return None


def _connected(path: Path, mode: str) -> sqlite3.Connection:
    return sqlite3.connect(f"{path.resolve().as_uri()}?mode={mode}", uri=True, timeout=_PATIENCE, isolation_level=None)


def _is_resting(path: Path) -> bool:
    """Whether a store in WAL mode has no log. Of one without WAL no file tells that nobody writes, but reading it makes none."""
    with path.open("rb") as file:
        is_wal = file.read(20)[18:] == b"\2\2"
    return is_wal and not any(Path(f"{path}{end}").exists() for end in ("-wal", "-journal"))


def _crc(row: list[Any]) -> int:
    """Of the values as SQLite gives them back, so that a value of another type counts as altered too."""
    return zlib.crc32(repr(row).encode())


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    """Turns SQLite's and the system's errors into ours."""
    try:
        yield
    except OSError as error:
        raise ResourceError(f"{path} must be readable; {error.strerror}; check its permissions") from error
    except UnicodeDecodeError as error:  # SQLite quotes a damaged schema in its message
        raise DamagedError(f"{path} must be a whole SQLite file; its schema is not text; {MEND}") from error
    except sqlite3.DatabaseError as error:
        if getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_READONLY_ROLLBACK:
            raise DamagedError(f"{path} must hold whole writes only; a write was cut off; {MEND}") from error
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the higher bits say more than is needed here
        if code in _BUSY:
            raise InUseError(f"{path} must have one writer; another process holds it; wait for it") from error
        if code in _SURROUNDINGS:
            raise ResourceError(f"{path} must be writable; {error}; free the disk or check permissions") from error
        raise DamagedError(f"{path} must be a whole sample store; {error}; {MEND}") from error
