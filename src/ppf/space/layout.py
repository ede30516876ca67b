"""Site and Layout: the removable places of a model, in order, with what each unit costs.

a layer            site "attn": units = KV groups         site "ffn": units = channels
┌───────────────┐    q q │ q q │ q q   <- writers: rows      gate ▮▮▮▮▮▮▮▮  <- writers: rows
│ attn ─► ffn   │     k  │  k  │  k       of q, k, v         up   ▮▮▮▮▮▮▮▮     of gate, up
└───────────────┘     v  │  v  │  v                          down ▮▮▮▮▮▮▮▮  <- reader: columns
                     o columns         <- reader
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np

from ppf.errors import DamagedError

_MAY_BE_ZERO = {"layer", "offset", "cache", "floor", "rest", "last_rest"}
_MOST = 2**53  # numbers up to here are exact as floats too


@dataclass(frozen=True)
class Rows:
    """Output rows of one linear module that belong to the units of a site.

    Unit ``u`` owns rows ``offset + u * width`` to ``offset + (u + 1) * width``.
    """

    module: str
    offset: int
    width: int


@dataclass(frozen=True)
class Site:
    """One place of one layer where units can be removed.

    Attributes:
        layer: Index of the decoder layer.
        kind: ``"attn"`` (a unit is a KV group: one key and value head with all query heads that read it) or
            ``"ffn"`` (a unit is one channel), or ``"expert"`` and its number (a unit is one channel of that expert). No two
            sites of a layer are of one kind.
        units: How many units the dense model has here.
        cost: Parameters that one unit holds.
        writers: The rows that produce the units.
        reader: The linear module whose input columns the units feed.
        columns: Input columns of the reader per unit.
        shapes: Per-layer config fields, each as (name, value per kept unit).
        cache: KV-cache elements per token and unit.
        floor: The fewest units that may stay; 0 where the whole sub-layer may go.
        norms: Entries of norms that average over all units of the site at once.
        rest: Parameters besides the units that go with the last of them, such as the sub-layer's norm; no ratio counts them.
        last_rest: Of the first expert of a layer, those that go when no expert of the layer is left.
    """

    layer: int
    kind: str
    units: int
    cost: int
    writers: tuple[Rows, ...]
    reader: str
    columns: int
    shapes: tuple[tuple[str, int], ...]
    cache: int = 0
    floor: int = 1
    norms: tuple[Rows, ...] = ()
    rest: int = 0
    last_rest: int = 0

    @property
    def role(self) -> str:
        """The kind without the number of an expert."""
        return role_of(self.kind)

    @property
    def sees_all(self) -> bool:
        """Whether it is the expert of a mixture that all tokens see."""
        return ".shared_expert." in self.reader

    @property
    def label(self) -> str:
        """Short name for people, such as ``"L03 attn"``."""
        return f"L{self.layer:02d} {self.kind}"


def role_of(kind: str) -> str:
    """A kind of site without the number of an expert."""
    return kind.rstrip("0123456789")


@dataclass(frozen=True)
class Layout:
    """All sites of a model in the order in which data meets them.

    Attributes:
        model_type: Family name as transformers has it, such as ``"llama"``.
        layers: Number of decoder layers.
        sites: The removable places.
        total: Parameters of the whole dense model, shared ones counted once.
    """

    model_type: str
    layers: int
    sites: tuple[Site, ...]
    total: int

    @cached_property
    def units(self) -> np.ndarray:
        """Int[S]: units of each site."""
        return _frozen([site.units for site in self.sites])

    @cached_property
    def costs(self) -> np.ndarray:
        """Int[S]: parameters per unit of each site."""
        return _frozen([site.cost for site in self.sites])

    @cached_property
    def floors(self) -> np.ndarray:
        """Int[S]: the fewest units that may stay at each site."""
        return _frozen([site.floor for site in self.sites])

    @cached_property
    def prunable(self) -> int:
        """Parameters in removable units; a ratio is a share of these."""
        return int(self.units @ self.costs)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything above; every artefact of a model carries it."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()[:32]

    @cached_property
    def rests(self) -> np.ndarray:
        """Int[S]: parameters that go with the last unit of each site."""
        return _frozen([site.rest for site in self.sites])

    def kept_params(self, kept: np.ndarray) -> np.ndarray | int:
        """Parameters of the whole model when ``kept`` (Int[..., S]) units stay."""
        gone = np.asarray(kept) == 0
        params = self.total - (self.units - np.asarray(kept)) @ self.costs - gone @ self.rests
        for sites, rest in self._mixtures:
            params = params - gone[..., sites].all(axis=-1) * rest
        return params

    @cached_property
    def _mixtures(self) -> list[tuple[list[int], int]]:
        """For each layer that its last expert takes something with, its experts and how much that is."""
        firsts = [site for site in self.sites if site.last_rest]
        experts = [(index, site.layer) for index, site in enumerate(self.sites) if site.role == "expert"]
        return [([index for index, layer in experts if layer == first.layer], first.last_rest) for first in firsts]

    def ratio(self, kept: np.ndarray) -> np.ndarray | float:
        """The share of the prunable parameters that is gone when ``kept`` (Int[..., S]) units stay."""
        return (self.units - np.asarray(kept)) @ self.costs / self.prunable

    def kept_layers(self, kept: np.ndarray) -> list[int]:
        """The layers that keep a unit when ``kept`` (Int[S]) stay, in order; an export has no others."""
        return sorted({site.layer for site, count in zip(self.sites, kept, strict=True) if count})

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready record; ``from_json`` is its inverse."""
        record = asdict(self)
        for site in record["sites"]:  # left out where there are none: the fingerprints of earlier layouts stay as they were
            for name in ("norms", "rest", "last_rest"):
                if not site[name]:
                    del site[name]
        return record

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Layout":
        """Rebuilds a layout.

        Raises:
            DamagedError: The record is not one that ``to_json`` made.
        """
        try:
            sites = tuple(
                Site(
                    **{
                        **site,
                        "writers": tuple(Rows(**rows) for rows in site["writers"]),
                        "shapes": tuple((name, per_unit) for name, per_unit in site["shapes"]),
                        "norms": tuple(Rows(**rows) for rows in site.get("norms", ())),
                    }
                )
                for site in record["sites"]
            )
            layout = cls(record["model_type"], record["layers"], sites, record["total"])
            _check(layout)
            return layout
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedError(f"a layout record must be whole; {error!r} came; fit the study again") from error


def _check(layout: Layout) -> None:
    """Refuses what no model has: a JSON record may hold anything in the place of anything."""
    rows = (rows for site in layout.sites for rows in (*site.writers, *site.norms))
    parts: tuple[Layout | Site | Rows, ...] = (layout, *layout.sites, *rows)
    values = [(field.name, field.type, getattr(part, field.name)) for part in parts for field in fields(part)]
    for name, per_unit in (shape for site in layout.sites for shape in site.shapes):
        values += [("shapes", str, name), ("shapes", int, per_unit)]
    for name, kind, value in values:
        if kind in (int, str) and type(value) is not kind:  # not isinstance: True is no number
            raise TypeError(f"{name} of type {type(value).__name__}")
        if kind is int and not (0 if name in _MAY_BE_ZERO else 1) <= value <= _MOST:
            raise ValueError(f"{name} out of range")
    if not layout.sites or any(site.floor > site.units or site.layer >= layout.layers for site in layout.sites):
        raise ValueError("no site, or one with a floor above its units or a layer above the last")
    if sum(site.units * site.cost + site.rest + site.last_rest for site in layout.sites) > layout.total:
        raise ValueError("more prunable parameters than parameters")


def _frozen(values: list[int]) -> np.ndarray:
    array = np.array(values, dtype=np.int64)
    array.flags.writeable = False
    return array
