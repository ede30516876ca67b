import json
import re
import time

import httpx
import openai
import pytest

import tiny_models as tiny
from http_client import request, strict
from ppf.llm.generate import Sampling, generate
from ppf.server.job import Job

PROMPT = "w5 w9 w40 w7"
MESSAGES = [{"role": "system", "content": "w5 w9"}, {"role": "user", "content": [{"type": "text", "text": "w40 w7"}]}]


@pytest.fixture(scope="module")
def client(live):
    with openai.OpenAI(base_url=f"http://127.0.0.1:{live[0]}/v1", api_key="none", max_retries=0) as client:
        yield client


def greedy(live, ratio, count):
    """What the library says."""
    served = live[1].live
    view = served.size_for(ratio).view
    ids = served.tokenizer.encode(PROMPT)
    pieces = generate(served.elastic, served.tokenizer, ids, Sampling(count, temperature=0), lambda: view)
    return "".join(piece.text for piece in pieces)


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "ppf"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


@pytest.mark.parametrize("ratio", [0, 0.3, 0.6])
def test_a_completion_is_made_at_the_ratio_of_its_request(client, live, ratio):
    answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=8, temperature=0, extra_body={"prune_ratio": ratio})
    assert answer.choices[0].text == greedy(live, ratio, 8)
    assert answer.object == "text_completion" and answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage.prompt_tokens == 4 and answer.usage.total_tokens == 4 + answer.usage.completion_tokens
    assert answer.ppf["ratio"] >= ratio and answer.ppf["switches"] == []
    assert live[1].live.size.decision.asked == 0


def test_without_a_ratio_it_is_made_at_the_live_one(client, live):
    live[1].set_ratio(0.5)
    try:
        answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=8, temperature=0)
    finally:
        live[1].set_ratio(0.0)
    assert answer.choices[0].text == greedy(live, 0.5, 8) and answer.ppf["ratio"] >= 0.5


def test_a_stream_brings_the_same_text(client, live):
    options = {"model": "tiny", "prompt": PROMPT, "max_tokens": 8, "temperature": 0, "extra_body": {"prune_ratio": 0.4}}
    chunks = list(client.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    whole = client.completions.create(**options)
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] == whole.choices[0].finish_reason
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage and chunks[-1].ppf == whole.ppf
    assert len({chunk.id for chunk in chunks}) == 1


def begun(live, monkeypatch, then=lambda: None):
    """What a long answer, whole and as a stream, says at its end; ``then`` is called as soon as it runs."""
    at, called = live[1].live.elastic.at, []

    def slow(*view):
        time.sleep(0.02)
        if not called:
            called.append(then())
        return at(*view)

    records = []
    for stream in (False, True):
        called.clear()
        monkeypatch.setattr(live[1].live.elastic, "at", slow)
        body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 40, "temperature": 0, "stop": "never", "stream": stream}
        status, _, found = request(live[0], "POST", "/v1/completions", json.dumps(body).encode(), seconds=20)
        assert status == 200
        events = re.findall(r"data: (\{.*\})", found.decode()) if stream else [found]
        records.append(strict(events[-1]))
    return records


def test_an_answer_says_what_ended_it(client, live):
    words = greedy(live, 0, 8).split()
    for more, ended in (({}, "length"), ({"stop": words[2]}, "stop")):
        options = {"model": "tiny", "prompt": PROMPT, "max_tokens": 8, "temperature": 0, **more}
        whole, *_, last = client.completions.create(**options), *client.completions.create(**options, stream=True)
        assert whole.ppf["ended"] == last.ppf["ended"] == ended
        assert whole.choices[0].finish_reason == last.choices[0].finish_reason == ended
        chat = {**options, "messages": MESSAGES}
        del chat["prompt"]
        whole, *_, last = client.chat.completions.create(**chat), *client.chat.completions.create(**chat, stream=True)
        assert whole.ppf["ended"] == last.ppf["ended"] == whole.choices[0].finish_reason


@pytest.mark.parametrize("temperature", [1e-320, 1e-46, 1e-6])
def test_next_to_no_temperature_is_greedy(client, live, temperature):
    answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=8, temperature=temperature)
    assert answer.choices[0].text == greedy(live, 0, 8)


def test_an_answer_whose_time_is_up_says_so(live, monkeypatch):
    monkeypatch.setattr("ppf.server.live._SECONDS", 0.1)
    for record in begun(live, monkeypatch):
        assert record["ppf"]["ended"] == "time" and record["choices"][0]["finish_reason"] == "length"


def test_an_answer_that_the_server_s_end_cuts_says_so(live, monkeypatch):
    served = live[1].live

    def stop():
        for job in list(served._jobs):  # as closing does, which this server outlives
            job.ended = "shutdown"
            job.cancelled.set()

    for record in begun(live, monkeypatch, stop):
        assert record["ppf"]["ended"] == "shutdown" and record["choices"][0]["finish_reason"] == "length"


def test_how_many_tokens_may_come_has_two_names_in_both_kinds_and_the_newer_counts(client):
    options = {"model": "tiny", "stop": ["never"], "temperature": 0}
    for extra in ({"max_completion_tokens": 3}, {"max_completion_tokens": 3, "max_tokens": 9}):
        answer = client.completions.create(**options, prompt=PROMPT, max_tokens=extra.get("max_tokens"), extra_body=extra)
        assert answer.usage.completion_tokens <= 3
        assert client.chat.completions.create(**options, messages=MESSAGES, **extra).usage.completion_tokens <= 3
    assert client.completions.create(**options, prompt=PROMPT).usage.completion_tokens <= 16


def test_a_chat(client):
    options = {"model": "tiny", "messages": MESSAGES, "max_completion_tokens": 6, "seed": 3, "temperature": 0.8, "top_p": 0.9}
    answer = client.chat.completions.create(**options, extra_body={"prune_ratio": 0.2})
    assert answer.object == "chat.completion" and answer.choices[0].message.role == "assistant"
    assert answer.usage.prompt_tokens == 4
    chunks = list(client.chat.completions.create(**options, stream=True, extra_body={"prune_ratio": 0.2}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answer.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == answer.choices[0].finish_reason


def test_a_chat_template_is_used_where_there_is_one(client, live, monkeypatch):
    template = "{% for m in messages %}{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}w60{% endif %}"
    monkeypatch.setattr(live[1].live.tokenizer, "chat_template", template)
    assert client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=1).usage.prompt_tokens == 5
    monkeypatch.setattr(live[1].live.tokenizer, "chat_template", "{{ raise_exception('roles\\nmust alternate') }}")
    with pytest.raises(openai.BadRequestError, match="roles must alternate"):
        client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=1)


def test_stop_strings(client, live):
    words = greedy(live, 0, 8).split()
    answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=8, temperature=0, stop=[words[2], "never"])
    assert answer.choices[0].text.split() == words[: words.index(words[2])] and answer.choices[0].finish_reason == "stop"


def test_token_ids_as_a_prompt(client, live):
    ids = live[1].live.tokenizer.encode(PROMPT)
    for prompt in (ids, [PROMPT]):
        answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=5, temperature=0)
        assert answer.choices[0].text == greedy(live, 0, 5)


@pytest.mark.parametrize(
    "wrong",
    [
        {"model": "gpt-4"}, {"prompt": ""}, {"prompt": []}, {"prompt": ["w3", "w4"]}, {"prompt": [96]}, {"prompt": [-1]},
        {"prompt": "w3 " * 64}, {"prompt": "w3 " * 30, "max_tokens": 35}, {"max_tokens": 41}, {"max_tokens": 0}, {"n": 2},
        {"best_of": 2}, {"logprobs": 1}, {"echo": True}, {"suffix": "w3"}, {"temperature": -1}, {"temperature": 3}, {"top_p": 0},
        {"frequency_penalty": 0.5}, {"logit_bias": {"5": 1}}, {"stop": [""]}, {"stop": ["a"] * 5},
        {"extra_body": {"prune_ratio": 1}}, {"extra_body": {"prune_ratio": 0.999}}, {"extra_body": {"prune_ratio": "0.3"}},
        {"extra_body": {"file": "/etc/passwd"}}, {"stream": True, "extra_body": {"prune_ratio": 0.999}},
    ],
)  # fmt: skip
def test_what_cannot_be_answered_is_refused_and_never_ignored(client, wrong):
    with pytest.raises(openai.APIStatusError) as caught:
        client.completions.create(**{"model": "tiny", "prompt": PROMPT, **wrong})
    assert caught.value.status_code == (404 if "model" in wrong else 400)
    assert caught.value.body["message"] and "\n" not in caught.value.body["message"]


def test_what_changes_nothing_is_taken(client):
    client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=1, n=1, user="u", frequency_penalty=0, logit_bias={}, echo=False, best_of=1
    )


def test_a_whole_context_is_answered(client):
    answer = client.completions.create(model="tiny", prompt="w3 " * 63, max_tokens=1)
    assert answer.usage.total_tokens == 64
    answer = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "w3 " * 62}])
    assert answer.usage.total_tokens <= 64


def test_a_client_that_leaves_ends_its_generation(live, monkeypatch):
    port, served = live
    forward = served.live.elastic.at

    def slow(*args):
        time.sleep(0.02)
        return forward(*args)

    monkeypatch.setattr(served.live.elastic, "at", slow)
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 40, "temperature": 0, "stream": True, "logit_bias": {}}
    before = served.live.meter.counts["cancelled"]
    with httpx.stream("POST", f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=5) as stream:
        next(stream.iter_lines())
    end = time.monotonic() + 5
    while served.live.meter.counts["cancelled"] == before and time.monotonic() < end:
        time.sleep(0.02)
    assert served.live.meter.counts["cancelled"] == before + 1 and not served.live._jobs


def test_a_failure_in_mid_stream_is_an_event(live, monkeypatch):
    port, served = live
    error = RuntimeError("DefaultCPUAllocator: can't allocate memory")
    monkeypatch.setattr("ppf.server.live.generate", lambda *_: (_ for _ in ()).throw(error))
    body = json.dumps({"model": "tiny", "prompt": PROMPT, "stream": True}).encode()
    status, _, found = request(port, "POST", "/v1/completions", body)
    assert status == 200 and b'"code":"no_memory"' in found and b"DONE" not in found
    status, _, found = request(port, "POST", "/v1/completions", body.replace(b', "stream": true', b""))
    assert status == 503 and strict(found)["error"]["type"] == "server_error"


def test_too_many_at_once_are_refused(live, monkeypatch):
    port, served = live
    jobs = {Job([1], Sampling(1)) for _ in range(100)}
    monkeypatch.setattr(served.live, "_jobs", jobs)
    status, _, body = request(port, "POST", "/v1/completions", json.dumps({"model": "tiny", "prompt": PROMPT}).encode())
    assert status == 503 and strict(body)["error"]["code"] == "busy"
    monkeypatch.undo()
    assert tiny.VOCAB and not served.live._jobs
