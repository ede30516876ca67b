import pytest

import tiny_models
from chromium import chromium
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


@pytest.fixture(scope="module")
def browser():
    with chromium() as made:
        yield made


@pytest.fixture
def visit(browser):
    """Opens a page of a width; says at the end whether anything was complained of or asked of others."""
    contexts, said = [], []

    def open_page(port, width=1280, path="/", quiet=True, **options):
        context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        contexts.append(context)
        page = context.new_page()
        if quiet:
            page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
            page.on("pageerror", lambda error: said.append(str(error)))
        asked = f"http://127.0.0.1:{port}/"
        page.on("request", lambda one: said.append(one.url) if not one.url.startswith((asked, "data:", "blob:")) else None)
        page.goto(f"http://127.0.0.1:{port}{path}")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert said == []
