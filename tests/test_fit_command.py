import shlex

import pytest

from ppf import cli
from ppf.config import FitConfig
from ppf.fit_command import command_of
from ppf.provenance import portable

CHANGES = [{}, {"seed": 3, "rounds": 2, "text": "a b.txt"}, {"seq_len": 64, "max_ratio": 0.5}, {"depth": True}, {"workers": 2}]


@pytest.mark.parametrize("changes", CHANGES)
def test_the_command_gives_the_same_settings(changes):
    config = FitConfig("ref-a", "runs/x", **changes)
    words = shlex.split(command_of(vars(config)))
    assert words[:2] == ["ppf", "fit"]
    assert vars(cli._parse(words[1:])) == vars(config)


def test_what_is_told_of_a_command_is_up_to_who_tells_it():
    config = FitConfig("/home/someone/m7", "/home/someone/s", text="/home/someone/t.txt")
    assert command_of(vars(config), portable) == "ppf fit m7 --study s --text t.txt"


def test_settings_of_a_model_that_was_an_object_name_none():
    assert command_of({"model": "", "seed": 1}).startswith("ppf fit MODEL ")
