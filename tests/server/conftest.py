import pytest

import tiny_models
from server_runs import running, study_of

WORD = "-".join(["long", "enough", "a", "word"] * 2)


@pytest.fixture(scope="session")
def study(tmp_path_factory):
    """The folder of a fitted study of a tiny model that lies beside it."""
    place = tmp_path_factory.mktemp("served")
    model = tiny_models.save(place / "tiny", "llama-mha")
    return study_of(place / "study", model).folder


@pytest.fixture(scope="module")
def decisions(study):
    """The port of a server of decisions alone."""
    with running(study, no_model=True) as (port, _):
        yield port


@pytest.fixture(scope="module")
def live(study):
    """The port of a server with a model, and what serves it."""
    with running(study, max_tokens=40) as (port, served):
        yield port, served


@pytest.fixture(scope="module")
def guarded_port(study):
    """The port and the token of a server that asks for one."""
    with running(study, no_model=True, token=WORD) as (port, _):
        yield port, WORD
