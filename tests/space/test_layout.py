import json
from dataclasses import replace

import numpy as np
import pytest

from builders import LAYOUTS, layout, refuses
from ppf.errors import DamagedError
from ppf.space.layout import Layout, Rows, role_of

FIRST = layout().sites[0]
SITE_CHANGES = {
    "layer": 1, "kind": "ffn", "units": 3, "cost": 7, "writers": (Rows("other", 0, 1),), "reader": "other", "columns": 2,
    "shapes": (("other", 1),), "cache": 9, "floor": 2,
}  # fmt: skip


@pytest.mark.parametrize(("name", "total"), [("llama-2-7b", 6_738_415_616), ("llama-3-8b", 8_030_261_248)])
def test_parameters_are_those_of_the_published_models(name, total):
    assert LAYOUTS[name].total == total
    assert LAYOUTS[name].prunable == sum(site.units * site.cost for site in LAYOUTS[name].sites)


@pytest.mark.parametrize("name", LAYOUTS)
def test_kept_params_counts_what_stays(name):
    of = LAYOUTS[name]
    assert of.kept_params(of.units) == of.total
    assert of.kept_params(np.zeros_like(of.units)) == of.total - of.prunable
    one_less = of.units - np.eye(len(of.sites), dtype=int)
    np.testing.assert_array_equal(of.kept_params(one_less), of.total - of.costs)


def test_a_record_rebuilds_the_same_layout_through_json():
    of = layout(layers=3)
    again = Layout.from_json(json.loads(json.dumps(of.to_json())))
    assert again == of and again.fingerprint == of.fingerprint


def test_fingerprint_never_changes_between_versions():
    assert layout().fingerprint == "111b5fd8495483e93e8b028612222e76"


@pytest.mark.parametrize("field", [*SITE_CHANGES, "model_type", "layers", "total", "order"])
def test_fingerprint_tells_any_change(field):
    of = layout()
    if field in SITE_CHANGES:
        other = replace(of, sites=(replace(FIRST, **{field: SITE_CHANGES[field]}), *of.sites[1:]))
    elif field == "order":
        other = replace(of, sites=of.sites[::-1])
    else:
        other = replace(of, **{field: "mistral" if field == "model_type" else 3})
    assert other != of and other.fingerprint != of.fingerprint


def test_what_goes_with_the_last_unit_is_counted_and_told():
    of = layout()
    deep = replace(of, sites=(of.sites[0], *(replace(site, floor=0, rest=64) for site in of.sites[1:])))
    assert deep.fingerprint != of.fingerprint and Layout.from_json(json.loads(json.dumps(deep.to_json()))) == deep
    kept = deep.units * [1, 1, 0, 0]
    assert deep.kept_params(kept) == of.kept_params(kept) - 2 * 64 and deep.ratio(kept) == of.ratio(kept) == 0.5
    assert deep.kept_layers(kept) == [0] and deep.kept_layers(deep.units * [1, 1, 0, 1]) == [0, 1]


def test_what_goes_with_the_last_expert_of_a_layer_is_counted_once():
    of = layout()
    first, second = (replace(of.sites[3], kind=f"expert{index}", units=86, floor=0, rest=64) for index in range(2))
    mixed = replace(of, sites=(*of.sites[:3], replace(first, last_rest=32), second))
    assert Layout.from_json(json.loads(json.dumps(mixed.to_json()))) == mixed
    kept = mixed.units * np.array([[1, 1, 1, 0, 1], [1, 1, 1, 1, 0], [1, 1, 1, 0, 0], [1, 1, 0, 1, 1]])
    extra = (mixed.units - kept) @ mixed.costs + mixed.kept_params(kept) - mixed.total
    assert extra.tolist() == [-64, -64, -160, 0] and mixed.kept_params(kept[2]) == mixed.kept_params(kept)[2]


@pytest.mark.parametrize("name", ["units", "costs", "floors", "rests"])
def test_arrays_are_read_only(name):
    with pytest.raises(ValueError, match="read-only"):
        getattr(layout(), name)[0] = 5


@pytest.mark.parametrize("key", ["model_type", "layers", "sites", "total"])
def test_a_record_without_a_key_is_refused(key):
    record = layout().to_json()
    del record[key]
    with refuses(DamagedError):
        Layout.from_json(record)


@pytest.mark.parametrize("change", [{"writers": 3}, {"writers": [{"module": "q"}]}, {"shapes": [["a", 1, 2]]}, {"colour": "red"}])
def test_a_record_of_a_broken_site_is_refused(change):
    record = json.loads(json.dumps(layout().to_json()))
    record["sites"][0].update(change)
    with refuses(DamagedError):
        Layout.from_json(record)


WRONG = [
    {"layer": -1}, {"layer": 2}, {"layer": None}, {"kind": 3}, {"reader": None}, {"columns": 0}, {"cache": -1},
    {"units": "2"}, {"units": 2.0}, {"units": True}, {"units": 0}, {"units": -2}, {"units": 10**400},
    {"cost": 0}, {"cost": [1]}, {"units": 2**40, "cost": 2**40}, {"floor": -1}, {"floor": 3},
    {"shapes": [["a", "1"]]}, {"shapes": [[1, 1]]}, {"shapes": [["a", 0]]}, {"shapes": ["ab"]},
    {"writers": [{"module": 1, "offset": 0, "width": 1}]}, {"writers": [{"module": "q", "offset": -1, "width": 1}]},
    {"writers": [{"module": "q", "offset": 0, "width": 10**5000}]}, {"norms": [{"module": "n", "offset": 0, "width": 0}]},
    {"norms": "x"}, {"norms": [1]},
]  # fmt: skip


@pytest.mark.parametrize("change", WRONG, ids=range(len(WRONG)))
def test_a_record_of_a_site_that_no_model_has_is_refused(change):
    record = json.loads(json.dumps(layout().to_json()))
    record["sites"][0].update(change)
    with refuses(DamagedError):
        Layout.from_json(record)


@pytest.mark.parametrize(
    "change",
    [{"total": layout().prunable - 1}, {"total": 2**60}, {"total": "many"}, {"layers": 1}, {"layers": 2.0}, {"layers": True},
     {"model_type": None}, {"sites": []}],
)  # fmt: skip
def test_a_record_that_no_model_has_is_refused(change):
    with refuses(DamagedError):
        Layout.from_json({**layout().to_json(), **change})


@pytest.mark.parametrize("record", [None, [], "x", {}, {"sites": 5}, {"sites": [None]}])
def test_what_is_no_record_is_refused(record):
    with refuses(DamagedError):
        Layout.from_json(record)


def test_labels_are_short_and_distinct():
    labels = [site.label for site in LAYOUTS["llama-2-7b"].sites]
    assert labels[:2] == ["L00 attn", "L00 ffn"] and len(set(labels)) == len(labels)


def test_the_experts_of_a_layer_have_one_role():
    assert [role_of(kind) for kind in ("attn", "ffn", "expert0", "expert127")] == ["attn", "ffn", "expert", "expert"]
