import math

import pytest

from builders import refuses
from http_client import request, strict
from ppf.errors import DamagedError, InputError, PPFError, UnsupportedError
from ppf.server.wire import JsonResponse, Refusal, as_refusal, dump, error_body, load

BAD = {
    "NaN": b'{"ratio": NaN}',
    "infinity": b'{"ratio": Infinity}',
    "minus infinity": b'{"ratio": -Infinity}',
    "too large": b'{"ratio": 1e999}',
    "a big integer": b'{"ratio": ' + b"1" * 400 + b"}",
    "a huge integer": b'{"ratio": ' + b"1" * 5000 + b"}",
    "a name twice": b'{"ratio": 0.1, "ratio": 0.2}',
    "a lone surrogate": b'{"ratio": "\\ud800"}',
    "a byte order mark": b'\xef\xbb\xbf{"ratio": 0.1}',
    "UTF-16": '{"ratio": 0.1}'.encode("utf-16"),
    "no UTF-8": b'{"ratio": "\xff"}',
    "half": b'{"ratio": 0.1',
    "two": b'{"ratio": 0.1}{}',
    "a comment": b'{"ratio": 0.1 /* */}',
    "single quotes": b"{'ratio': 0.1}",
}
WRONG = {
    "true": b'{"ratio": true}',
    "a string": b'{"ratio": "0.5"}',
    "null": b'{"ratio": null}',
    "a list": b"[0.5]",
    "a number": b"0.5",
    "nothing in it": b"{}",
    "another name": b'{"ratio": 0.1, "path": "/etc/passwd"}',
    "one": b'{"ratio": 1}',
    "less than nothing": b'{"ratio": -0.1}',
    "nothing at all": b"",
}


@pytest.mark.parametrize("name", BAD | WRONG)
def test_what_is_not_a_ratio_in_strict_json_is_refused(live, name):
    port, served = live
    for _ in range(2):
        status, _, body = request(port, "POST", "/api/ratio", (BAD | WRONG)[name], Content_Type="application/json")
        assert status == 400 and "\n" not in strict(body)["error"]["message"]
    assert served.live.size.decision.asked == 0


@pytest.mark.parametrize("body", [b'{"ratio": 0.0}', b'{"ratio": -0.0}', b'{"ratio": 0}', b' {"ratio" : 0e0 }\n'])
def test_what_is_one_is_taken(live, body):
    assert request(live[0], "POST", "/api/ratio", body)[0] == 200


@pytest.mark.parametrize("name", BAD)
def test_the_reader_says_why(name):
    with pytest.raises(Refusal) as caught:
        load(BAD[name])
    assert caught.value.status == 400 and caught.value.message.count("; ") >= 2 and "sys." not in caught.value.message


def test_depth_is_limited():
    assert load(b"[" * 60 + b"]" * 60)
    for depth in (70, 5000):
        with pytest.raises(Refusal):
            load(b"[" * depth + b"]" * depth)


def test_numbers_that_are_not_finite_become_null():
    record = {"a": math.nan, "b": [1.5, math.inf, (-math.inf, {"c": math.nan})], "d": "NaN", "e": None, "f": True}
    assert strict(dump(record)) == {"a": None, "b": [1.5, None, [None, {"c": None}]], "d": "NaN", "e": None, "f": True}


def replaced(value, place, count):
    """The value with the number at a place among all numbers in it, counted from 0, not finite; and how many were counted."""
    if isinstance(value, dict):
        made = {}
        for name, inner in value.items():
            made[name], count = replaced(inner, place, count)
        return made, count
    if isinstance(value, list):
        made = []
        for inner in value:
            inner, count = replaced(inner, place, count)
            made.append(inner)
        return made, count
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value, count
    return (math.nan if place == count else value), count + 1


@pytest.mark.parametrize("path", ["/api/policy?ratio=0.3", "/api/study", "/api/state"])
def test_whichever_number_is_not_finite_the_answer_is_strict_json(live, path):
    status, _, body = request(live[0], "GET", path)
    record = strict(body)
    record["points"] = record.get("points", [])[:2]
    _, numbers = replaced(record, -1, 0)
    assert status == 200 and numbers > 10
    for place in range(numbers):
        found = strict(JsonResponse(replaced(record, place, 0)[0]).body)
        assert replaced(found, -1, 0)[1] == numbers - 1 and found.keys() == record.keys()


def test_text_that_is_none_is_replaced():
    assert strict(dump({"a": "\ud800é"})) == {"a": "?é"}


def test_errors_are_one_line_and_say_nothing_of_the_inside():
    body = error_body(400, "a\nb\x00c\u2028d", "x")["error"]
    assert body == {"message": "a b c d", "type": "invalid_request_error", "code": "x"}
    assert error_body(503, "m", "x")["error"]["type"] == "server_error"
    assert as_refusal(InputError("a; b; c")).status == as_refusal(UnsupportedError("a; b; c")).status == 400
    hidden = as_refusal(DamagedError("/home/someone/study must be whole; it is not; fit again"))
    assert hidden.status == 503 and "someone" not in hidden.message


def test_the_flags_of_the_command_line_are_fields_here():
    with refuses(InputError) as caught:
        raise InputError("exactly one of --ratio and --params must be given; none came; give one")
    assert "--" not in as_refusal(caught.value).message and isinstance(caught.value, PPFError)
