"""The page's files as text: what a browser would be told, without one."""

import re
from importlib.resources import files

import pytest

from http_client import request

STATIC = {path.name: path.read_text(encoding="utf-8") for path in files("ppf.server").joinpath("static").iterdir()}
PAGE = STATIC["index.html"]
SCRIPTS = {name: text for name, text in STATIC.items() if name.endswith(".js")}
TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}


@pytest.mark.parametrize("name", sorted(STATIC))
def test_every_file_is_served_with_its_type(decisions, name):
    status, headers, body = request(decisions, "GET", f"/static/{name}")
    assert status == 200 and body.decode() == STATIC[name]
    assert headers["content-type"].split(";")[0] in (TYPES[name.rsplit(".", 1)[1]], "application/javascript")


def test_the_page_is_at_the_root_and_may_run_only_its_own_scripts(decisions):
    status, headers, body = request(decisions, "GET", "/")
    assert status == 200 and body.decode() == PAGE and headers["content-type"].startswith("text/html")
    policy = headers["content-security-policy"]
    assert "default-src 'self'" in policy and "script-src" not in policy and "unsafe-eval" not in policy


@pytest.mark.parametrize("name", sorted(STATIC))
def test_no_file_leads_elsewhere(name):
    found = re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\"'\s]*", re.sub(r"(?m)^\s*//.*", "", STATIC[name]))
    assert set(found) <= {"http://www.w3.org/2000/svg"}, found  # a name of a language, which nothing fetches
    assert "@import" not in STATIC[name] and "url(" not in STATIC[name]


def test_the_page_has_no_script_or_style_in_it():
    assert re.findall(r"<script(?![^>]* src=)", PAGE) == [] and "<style" not in PAGE
    assert re.findall(r"\s(on\w+|style)=", PAGE) == []


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_whatever_is_shown_is_text(name):
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function"):
        assert word not in SCRIPTS[name], word


def test_scripts_ask_only_for_what_is_in_the_page():
    ids = set(re.findall(r'\sid="([\w-]+)"', PAGE))
    for name, text in SCRIPTS.items():
        sought = set(re.findall(r'\bget\("([\w-]+)"\)', text))
        assert sought <= ids, f"{name}: {sought - ids}"
        for imported in re.findall(r'from "/static/([\w.]+)"', text):
            assert imported in STATIC


def test_every_field_has_a_label_and_every_reference_a_target():
    ids = set(re.findall(r'\sid="([\w-]+)"', PAGE))
    fields = set(re.findall(r'<(?:input|textarea|select)\b[^>]*\sid="([\w-]+)"', PAGE))
    assert fields == set(re.findall(r'<label for="([\w-]+)"', PAGE)) and len(fields) == 6
    for value in re.findall(r'aria-labelledby="([^"]+)"', PAGE):
        assert set(value.split()) <= ids, value


def test_both_themes_have_the_same_colours():
    light, dark = (
        set(re.findall(r"(--[\w-]+):", part)) for part in STATIC["style.css"].split("@media (prefers-color-scheme: dark)")
    )
    assert light == dark
    assert set(re.findall(r"var\((--[\w-]+)\)", STATIC["style.css"])) <= light
