"""Plans: what goes, as a file says it, without a study.

    ppf.json of an export         its mask, for the same layout
    [0.2, 0.3, ...]               a pruning ratio a layer, as other tools give them
    [{"attn": 0.2, "ffn": 0.3}]   one of each kind a layer; or {"attn": [...], "ffn": [...]}
    a .csv file                   the same as columns: attn and ffn, or one column; a column named layer gives the order

Nothing in such a file is trusted: everything is checked before it is used.
"""

import csv
import io
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ppf.artifact import read_json
from ppf.errors import DamagedError, InputError, ResourceError
from ppf.space.budget import Budget
from ppf.space.layout import Layout
from ppf.space.mask import Mask
from ppf.space.policy import Policy

_MOST_BYTES = 64 * 2**20
_FORMAT = 1


def read_plan(path: Path) -> Any:
    """What a plan's file holds: JSON, or the columns of a .csv file by name, as lists of text.

    Raises:
        InputError: No such file, or too large a one.
        DamagedError: Not JSON, or not CSV.
        ResourceError: It cannot be read.
    """
    try:
        if not path.is_file():
            raise InputError(f"a plan must be a file; {str(path)!r} is none; give a ppf.json or a list of ratios")
        if path.stat().st_size > _MOST_BYTES:
            raise InputError(
                f"a plan must have at most {_MOST_BYTES:,} bytes; {path} has more; give a ppf.json or a list of ratios"
            )
        return _columns(path) if path.suffix.lower() == ".csv" else read_json(path)
    except OSError as error:
        if isinstance(error, ResourceError):
            raise
        raise ResourceError(f"{path} must be readable; {error.strerror}; check it") from error


def is_export(record: Any) -> bool:
    """Whether a plan is an export's ``ppf.json``."""
    return isinstance(record, Mapping) and "mask" in record


def mask_of(record: Mapping[str, Any], layout: Layout) -> Mask:
    """The mask of an export's ``ppf.json``.

    Args:
        record: What the file holds.
        layout: Of the model that it is to be applied to.

    Raises:
        DamagedError: The record is not whole, is of another format, or was made for another layout.
    """
    if record.get("format") != _FORMAT:
        raise DamagedError(f"a plan must be of format {_FORMAT}; {_short(record.get('format'))} came; export it again")
    if record.get("layout") != layout.fingerprint:
        raise DamagedError(
            f"a plan must be made for a model of this shape ({_shape(layout)}); it was made for another{_shape_of(record)}; "
            "apply it to its own dense model or a fine-tune of it"
        )
    sites = record["mask"]
    if not isinstance(sites, list) or len(sites) != len(layout.sites):
        raise DamagedError(f"a plan must have a mask of {len(layout.sites)} sites; it has not; export it again")
    bits = tuple(_bits(packed, site.units, site.floor, site.label) for packed, site in zip(sites, layout.sites, strict=True))
    mask = Mask(bits)
    _check_kept(record.get("kept"), mask, layout)
    return mask


def _shape(layout: Layout) -> str:
    return f"{layout.model_type}, {layout.layers} layers, {layout.total:,} parameters"


def _shape_of(record: Mapping[str, Any]) -> str:
    """What an export says of the dense model that it was cut from, if it says it well."""
    model, params = record.get("model"), record.get("params")
    if isinstance(model, Mapping) and isinstance(params, Mapping) and isinstance(params.get("before"), int):
        return f" ({str(model.get('type'))[:40]}, {params['before']:,} parameters)"
    return ""


def _check_kept(kept: Any, mask: Mask, layout: Layout) -> None:
    """Refuses a record that tells its readers otherwise than its mask."""
    told = [entry.get("kept") if isinstance(entry, Mapping) else None for entry in kept] if isinstance(kept, list) else None
    for site, bits, count in zip(layout.sites, mask.bits, told or (), strict=False):
        if count != int(bits.sum()):  # not numpy's number, which compares itself with each member of a list
            what = f"a plan must keep at {site.label} what its mask keeps, {int(bits.sum())}"
            raise DamagedError(f"{what}; it says {_short(count)}; restore it or export it again")
    if told is None or len(told) != len(layout.sites):
        raise DamagedError(f"a plan must say what stays at each of {len(layout.sites)} sites; it does not; export it again")


def _bits(packed: Any, units: int, floor: int, label: str) -> np.ndarray:
    size = -(-units // 8)
    if not isinstance(packed, str) or not re.fullmatch(f"[0-9a-f]{{{2 * size}}}", packed):
        raise DamagedError(f"the mask at {label} must be {size} bytes in hexadecimal; {_short(packed)} came; export it again")
    bits: np.ndarray = np.unpackbits(np.frombuffer(bytes.fromhex(packed), dtype=np.uint8)).astype(bool)
    if bits[units:].any() or bits[:units].sum() < floor:
        came = "it has bits beyond them" if bits[units:].any() else f"it keeps {int(bits.sum())}"
        raise DamagedError(f"the mask at {label} must keep {floor} to {units} units; {came}; export it again")
    return bits[:units]


def wish_of(record: Any, layout: Layout, align: int = 1, tp: int = 1) -> tuple[Policy, Budget]:
    """The policy and the budget of pruning ratios.

    Args:
        record: Ratios in [0, 1] in one of the forms of the module's table.
        layout: Of the model that they are for.
        align: Channels stay in multiples of this, which raises the floor.
        tp: KV groups and channels do too.

    Returns:
        Wishes Float[S], and the parameters that the ratios remove together: the mean ratio, weighted with what each site
        holds.

    Raises:
        InputError: Not such ratios, not one a layer, or more than the floors allow.
    """
    by_kind = _by_kind(record, layout)
    gone = np.array([by_kind[site.role][site.layer] for site in layout.sites])
    mean = float(gone @ (layout.units * layout.costs)) / layout.prunable
    if mean >= 1:
        raise InputError("pruning ratios must leave something; all are 1; ask for less")
    return Policy(1 - gone), Budget.from_ratio(mean, layout, align, tp)


def _by_kind(record: Any, layout: Layout) -> dict[str, list[float]]:
    """Per kind of site one ratio a layer."""
    kinds = list(dict.fromkeys(site.role for site in layout.sites))
    if isinstance(record, list) and record and all(isinstance(entry, Mapping) for entry in record):
        record = {kind: [entry.get(kind) for entry in record] for kind in kinds}
    if isinstance(record, Mapping) and not set(kinds) <= set(record):
        came = ", ".join(map(str, record)) or "nothing"
        raise InputError(
            f"a plan must be a ppf.json, a list of ratios, or have {' and '.join(kinds)}; it has {_short(came)}; name them so"
        )
    columns = {kind: record[kind] for kind in kinds} if isinstance(record, Mapping) else dict.fromkeys(kinds, record)
    return {kind: _ratios(column, kind, layout.layers) for kind, column in columns.items()}


def _ratios(column: Any, kind: str, layers: int) -> list[float]:
    if not isinstance(column, list) or len(column) != layers:
        came = len(column) if isinstance(column, list) else "no list"
        raise InputError(f"a plan must have {layers} pruning ratios for {kind}, one a layer; {came} came; give one for each")
    return [_ratio(value, kind, layer) for layer, value in enumerate(column)]


def _ratio(value: Any, kind: str, layer: int) -> float:
    number = value if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    if not 0 <= number <= 1:  # a NaN is refused too
        what = f"the pruning ratio of layer {layer} ({kind})"
        raise InputError(f"{what} must be a number in [0, 1]; {_short(value)} came; 0.3 removes 30 %")
    return float(number)


def _columns(path: Path) -> Any:
    """A list of numbers, or lists by column name; in the order of the column ``layer`` if there is one."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # spreadsheets begin their files with a byte-order mark
        between = ";" if ";" in text.partition("\n")[0] else ","
        rows = [row for row in csv.reader(io.StringIO(text), strict=True, delimiter=between) if any(map(str.strip, row))]
    except (ValueError, csv.Error) as error:  # not UTF-8 is a ValueError too
        raise DamagedError(f"{path} must be a CSV file in UTF-8; {error}; mend it") from error
    names = [cell.strip().lower() for cell in rows[0]] if rows and not _is_number(rows[0][0]) else []
    try:
        return _by_name(names, [[float(cell) for cell in row] for row in rows[bool(names) :]])
    except ValueError as error:
        came = f"{error} (its first row: {_short(between.join(rows[0]) if rows else '')})"
        raise InputError(f"{path} must hold columns of ratios, named attn and ffn or one alone; {came}; mend it") from error


def _by_name(names: list[str], body: list[list[float]]) -> Any:
    if not body or len({len(row) for row in body} | ({len(names)} if names else set())) != 1:
        raise ValueError("rows of different lengths, or none")
    if "layer" in names:
        place = names.index("layer")
        body = sorted(body, key=lambda row: row[place])
        if [row[place] for row in body] != list(range(len(body))):
            raise ValueError("layers are not counted 0, 1, 2 ...")
        names, body = [n for n in names if n != "layer"], [row[:place] + row[place + 1 :] for row in body]
    if len(body[0]) == 1:
        return [row[0] for row in body]
    if not names:
        raise ValueError("several columns without names")
    return {name: [row[index] for row in body] for index, name in enumerate(names)}


def _is_number(cell: str) -> bool:
    try:
        return math.isfinite(float(cell))
    except ValueError:
        return False


def _short(value: Any) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
