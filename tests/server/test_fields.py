import json

import pytest
from pydantic import ValidationError

from http_client import request, strict
from ppf.server import fields, schemas
from ppf.server.fields import of_field
from ppf.server.schemas import ChatBody, CompletionBody, PolicyQuery

COMPLETION = {"model": "tiny", "prompt": "w5", "max_tokens": 1}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "w5"}], "max_tokens": 1}


def said(schema, given):
    with pytest.raises(ValidationError) as caught:
        schema.model_validate(given)
    refusal = of_field(caught.value.errors()[0], given)
    assert refusal.status == 400 and "\n" not in refusal.message and refusal.message.count("; ") == 2
    return refusal.message


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"prompt": 5}, "prompt must be one text, or a list of one text or of token ids; 5 came; change it"),
        ({"prompt": ["a", "b"]}, 'prompt must be one text, or a list of one text or of token ids; ["a", "b"] came; change it'),
        ({"stop": ["a", 5]}, 'stop must be a text of 1 to 200 characters, or at most 4 of them; ["a", 5] came; change it'),
        ({"stop": ""}, 'stop must be a text of 1 to 200 characters, or at most 4 of them; "" came; change it'),
        ({"temperature": 3}, "temperature must be a number from 0 to 2; 3 came; change it"),
        ({"temperature": True}, "temperature must be a number from 0 to 2; true came; change it"),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage must be true or false; 1 came; change it"),
        ({"stream_options": 1}, 'stream_options must be an object such as {"include_usage": true}; 1 came; change it'),
        ({"n": True}, "n must be 1 or left out: there is one answer to a request; true came; leave it out"),
        ({"best_of": True}, "best_of must be 1 or left out: there is one answer to a request; true came; leave it out"),
        ({"n": 2}, "n must be 1 or left out: there is one answer to a request; 2 came; leave it out"),
        ({"echo": 0}, "echo must be false or left out: an answer does not repeat its prompt; 0 came; leave it out"),
        ({"echo": True}, "echo must be false or left out: an answer does not repeat its prompt; true came; leave it out"),
        ({"top_k": 5}, 'a request may have the fields that this route knows; "top_k" came; leave it out'),
        ({"logprobs": 2}, "logprobs must be left out: this server has none; 2 came; leave it out"),
        ({"frequency_penalty": 1}, "frequency_penalty must be 0 or left out: this server has no penalties; 1 came; leave it out"),
        ({"logit_bias": {"5": "x"}}, 'logit_bias.5 must be empty or left out: this server has none; "x" came; leave it out'),
        ({"user": "a" * 301}, "user must be a text of at most 300 characters; " + '"' + "a" * 59 + " ... came; change it"),
    ],
)
def test_a_field_of_a_completion_is_named_as_it_was_sent(more, message):
    assert said(CompletionBody, {**COMPLETION, **more}) == message


@pytest.mark.parametrize(
    ("messages", "start"),
    [
        ([], "messages must be a list of 1 to 1000 messages such as "),
        (
            [{"role": "user", "content": "a"}, {"role": "tool", "content": "a"}],
            "messages[1].role must be system, developer, user or",
        ),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content must be a text, or a list of parts such as"),
        ([{"role": "user"}], "messages[0].content must be a text, or a list of parts such as"),
        ([5], "messages[0]"),
        ([{"role": "user", "content": "a", "mood": "good"}], "a request may have the fields that this route knows; "),
    ],
)
def test_a_field_of_a_chat_is_named_as_it_was_sent(messages, start):
    message = said(ChatBody, {**CHAT, "messages": messages})
    assert message.startswith(start)
    if "mood" in str(messages):
        assert '"messages[0].mood"' in message


def test_what_is_not_there_is_to_be_added():
    assert said(CompletionBody, {"model": "tiny"}) == (
        "prompt must be one text, or a list of one text or of token ids; it did not come; add it"
    )


@pytest.mark.parametrize(
    ("body", "came"), [(b"[0.5]", "[0.5] came"), (b"0.5", "0.5 came"), (b'"x"', '"x" came'), (b"", "none came")]
)
def test_a_body_that_is_no_object(live, body, came):
    status, _, found = request(live[0], "POST", "/api/ratio", body, Content_Type="application/json")
    assert status == 400 and strict(found)["error"]["message"] == f"the body must be a JSON object; {came}; send one"


def test_over_http_it_is_the_same_line(live, decisions):
    status, _, found = request(live[0], "POST", "/v1/completions", json.dumps({**COMPLETION, "stop": [1]}).encode())
    assert status == 400 and strict(found)["error"]["message"].startswith("stop must be a text of 1 to 200 characters")
    status, _, found = request(decisions, "GET", "/api/policy?ratio=a")
    assert strict(found)["error"]["message"] == 'ratio must be a number from 0 to less than 1; "a" came; change it'
    assert said(PolicyQuery, {"ratio": "0.1", "align": "0"}).startswith("align must be a whole number from 1 to 65536; ")
    for name, must in (("ratio", "from 0 to less than 1"), ("latency_ms", "of milliseconds above 0"), ("align", "from 1 to 65536")):
        assert f'{must}; "0_3" came' in said(PolicyQuery, {name: "0_3"})


def test_every_field_says_what_it_must_be():
    kinds = [kind for kind in vars(schemas).values() if isinstance(kind, type) and issubclass(kind, schemas.BaseModel)]
    named = {name for kind in kinds for name in kind.model_fields}
    assert named == set(fields._MUST) and all(fields._MUST.values())
