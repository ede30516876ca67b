"""One table for the command line, the library and the API: which ratios there are, and what is said of the others."""

import json

import numpy as np
import pytest

from builders import refuses
from http_client import request, strict
from ppf import cli
from ppf.config import Target
from ppf.decide import Decider
from ppf.errors import InputError

INF = float("inf")
TABLE = {  # on the command line, in Python, in a query, and whether it is one
    "-0.1": ("-0.1", -0.1, "-0.1", False), "0": ("0", 0, "0", True), "tiny": ("1e-12", 1e-12, "1e-12", True),
    "nearly all": ("0.999", 0.999, "0.999", False), "1": ("1", 1, "1", False), "1.5": ("1.5", 1.5, "1.5", False),
    "NaN": ("nan", float("nan"), "nan", False), "infinite": ("inf", INF, "inf", False),
    "minus infinite": ("-inf", -INF, "-inf", False),
    "a text": ("third", "0.3", "third", False), "a bool": ("True", True, "true", False), "nothing": ("", None, "", False),
    "too large": ("1e999", 1e999, "1e999", False), "endless": ("1" * 5001, 10**5000, "1" * 5001, False),
}  # fmt: skip


@pytest.mark.parametrize("kind", TABLE)
def test_command_line_library_and_api_agree(decisions, study, capsys, kind):
    word, value, query, good = TABLE[kind]
    code = cli.main(["policy", str(study), "--json", f"--ratio={word}"])
    out, err = capsys.readouterr()
    status, _, body = request(decisions, "GET", f"/api/policy?ratio={query}")
    if good:
        found = Decider(study).decide(Target(ratio=value))
        assert (
            code == 0 and status == 200 and json.loads(out)["ratio"] == strict(body)["ratio"] == {"asked": value, "met": found.met}
        )
        return
    assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1 and len(err) < 400
    with refuses(InputError) as caught:
        Decider(study).decide(Target(ratio=value))
    assert len(str(caught.value)) < 400
    assert status == (414 if len(query) > 5000 else 400) and strict(body)["error"]["message"]


def test_the_largest_ratio_is_told(study, decisions, capsys):
    assert cli.main(["policy", str(study), "--ratio", "0.999"]) == 2
    least = capsys.readouterr().err.split("at most ratio ")[1].split()[0]
    assert cli.main(["policy", str(study), "--json", "--ratio", least]) == 0
    assert f"at most ratio {least}" in strict(request(decisions, "GET", "/api/policy?ratio=0.999")[2])["error"]["message"]


def test_a_thousand_ratios_are_met_to_within_one_unit(study):
    decider = Decider(study)
    most = float((decider.layout.units - decider.layout.floors) @ decider.layout.costs / decider.layout.prunable)
    unit = decider.layout.costs.min() / decider.layout.prunable
    for ratio in np.random.default_rng(0).uniform(0, most - 1e-9, 1000).tolist():
        met = decider.decide(Target(ratio=ratio)).met
        assert ratio - 1e-9 <= met < ratio + unit + 1e-9
