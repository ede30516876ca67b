import contextlib
import json
import shutil
import signal
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from builders import refuses
from http_client import exchange, request
from ppf.cli import main
from ppf.config import ServeConfig
from ppf.errors import InputError
from ppf.server import run
from ppf.server.run import access_of
from ppf.study import read_sealed, write_sealed
from server_runs import process, running

ANYWHERE = ".".join("0000")
LONG = "0123456789abcdefghijklmnop"
STOPPING = "stopping; what is not answered soon is ended\n"


def refused_start(capsys, *arguments):
    code = main(["serve", *arguments])
    error = capsys.readouterr().err.strip()
    error = error.removeprefix("loading ...\n")
    assert error.startswith("error: ") and "\n" not in error
    return code, error


# --- where it listens ---


def test_it_listens_at_loopback_alone(decisions):
    assert request(decisions, "GET", "/api/state")[0] == 200
    listening = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(FileNotFoundError), open(table, encoding="ascii") as file:
            rows = [line.split() for line in file.readlines()[1:]]
            listening += [row[1] for row in rows if row[3] == "0A" and row[1].endswith(f":{decisions:04X}")]
    assert listening == [f"0100007F:{decisions:04X}"]


@pytest.mark.parametrize("host", [ANYWHERE, "::", "10.0.0.1", "box.example"])
def test_beyond_loopback_it_does_not_start_without_a_token(study, capsys, monkeypatch, host):
    monkeypatch.delenv("PPF_TOKEN", raising=False)
    code, error = refused_start(capsys, str(study), "--host", host, "--port", "0", "--no-model")
    assert code == 2 and "token" in error


def test_the_token_may_come_from_the_environment(study, monkeypatch):
    monkeypatch.setenv("PPF_TOKEN", "short")
    with refuses(InputError):
        run._with_token(ServeConfig(str(study)))
    monkeypatch.setenv("PPF_TOKEN", LONG)
    assert run._with_token(ServeConfig(str(study), host=ANYWHERE)).token == LONG
    given = ServeConfig(str(study), token=LONG[::-1])
    assert run._with_token(given) == given


def test_the_token_is_never_written_anywhere(study):
    with process(study, "--no-model", "--token", LONG) as (server, port):
        for given in (f"Bearer {LONG}", f"Basic {LONG}", f"Bearer {LONG} {LONG}"):
            answers = [request(port, "GET", f"/api/state?token={LONG}", Authorization=given), request(port, "GET", f"/{LONG}")]
            assert all(LONG.encode() not in body and LONG not in str(headers) for _, headers, body in answers)
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=10) == 0 and LONG not in server.stdout.read() + server.stderr.read()


def test_who_may_ask_depends_on_where_it_listens():
    assert not access_of(ServeConfig("s"), 8000).any_address
    access = access_of(ServeConfig("s", host="127.0.0.2"), 8000)
    assert access.knows("127.0.0.2:8000") and not access.knows("10.0.0.1:8000")
    beyond = access_of(ServeConfig("s", host=ANYWHERE, token=LONG), 8000)
    assert beyond.knows("10.0.0.1:8000") and beyond.token and not beyond.knows("evil.com:8000")


# --- starting ---


def test_what_keeps_it_from_starting_is_one_line(study, tmp_path, capsys, decisions):
    assert refused_start(capsys, str(tmp_path / "none"), "--no-model")[0] == 2
    assert refused_start(capsys, str(study), "--no-model", "--port", str(decisions))[0] == 6
    assert refused_start(capsys, str(study), "--no-model", "--host", "999.1.1.1", "--token", "x" * 30)[0] == 2
    damaged = shutil.copytree(study, tmp_path / "damaged")
    (damaged / "agent.safetensors").write_bytes(b"x" * 100)
    assert refused_start(capsys, str(damaged), "--no-model", "--port", "0")[0] == 4
    unfitted = shutil.copytree(study, tmp_path / "unfitted")
    (unfitted / "report.json").unlink()
    assert refused_start(capsys, str(unfitted), "--no-model", "--port", "0")[0] == 2
    assert refused_start(capsys, str(study), "--port", "0", "--model", str(tmp_path))[0] == 2


def test_a_model_that_has_gone_can_be_named(study, capsys):
    model = study.parent / "tiny"
    moved = model.rename(study.parent / "moved")
    try:
        code, error = refused_start(capsys, str(study), "--port", "0")
    finally:
        moved.rename(model)
    assert code == 2 and "--model" in error and str(model) in error


def test_whatever_else_is_wrong_with_its_model_is_told_as_such(study, tmp_path, capsys):
    own, bare = shutil.copytree(study, tmp_path / "own"), shutil.copytree(study.parent / "tiny", tmp_path / "bare")
    for path in bare.glob("tokenizer*"):
        path.unlink()
    for name, words in (("", "must be named"), (str(bare), "tokenizer")):
        record = read_sealed(own / "study.json")
        write_sealed(own / "study.json", {**record, "model": {**record["model"], "name": name}})
        code, error = refused_start(capsys, str(own), "--port", "0")
        assert code == 2 and words in error and "where it lay" not in error, error


@pytest.mark.parametrize(
    "flags",
    [
        ("--ratio", "0.5", "--max-ratio", "0.4", "--target-latency-ms", "5"),
        ("--ratio", "0.1", "--min-ratio", "0.2", "--target-latency-ms", "5"),
        ("--ratio", "0.7", "--target-latency-ms", "5"), ("--min-ratio", "0.7", "--target-latency-ms", "5"),
        ("--ratio", "0.9", "--max-ratio", "0.5"),
    ],
)  # fmt: skip
def test_a_ratio_outside_the_limits_is_refused_and_not_moved(study, capsys, flags):
    code, error = refused_start(capsys, str(study), "--port", "0", *flags)
    assert code == 2 and ("ratio must be at" in error or "a target" in error)


def test_a_missing_package_is_named(study, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ppf.server.run", None)
    code, error = refused_start(capsys, str(study), "--no-model")
    assert code == 5 and "pip install 'ppf[serve]'" in error


def test_decisions_alone_need_no_torch_and_stop_when_told(study):
    start = time.monotonic()
    with process(study, "--no-model") as (server, port):
        took = time.monotonic() - start
        assert request(port, "GET", "/api/policy?ratio=0.3")[0] == 200
        with open(f"/proc/{server.pid}/maps", encoding="utf-8") as maps:
            assert "libtorch" not in maps.read()
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=10) == 0 and server.stderr.read() == STOPPING
    assert took < 15  # 3 s on a machine of its own


def test_a_stop_lets_a_request_under_way_end(study):
    with process(study, "--max-tokens", "50") as (server, port):
        body = b'{"model":"tiny","prompt":"w5","max_tokens":50,"stream":true,"temperature":0}'
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost:{port}\r\nContent-Type: application/json\r\n"
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            got = connection.recv(65536)
            server.send_signal(signal.SIGTERM)
            while chunk := connection.recv(65536):
                got += chunk
        assert b"[DONE]" in got
        start = time.monotonic()
        assert server.wait(timeout=20) == 0 and time.monotonic() - start < 15  # 5 s on a machine of its own
        assert "Traceback" not in server.stderr.read()


BODY = json.dumps({"model": "tiny", "prompt": "w5", "max_tokens": 50, "temperature": 0, "stop": "never"})


@contextlib.contextmanager
def slow(study, monkeypatch, seconds):
    """A server in this process whose tokens take a while."""
    with running(study, max_tokens=50) as (port, served):
        at = served.live.elastic.at
        monkeypatch.setattr(served.live.elastic, "at", lambda *view: time.sleep(seconds) or at(*view))
        yield port, served.live


def until(holds):
    end = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_stop_ends_what_would_take_longer_and_says_so(study, monkeypatch):
    monkeypatch.setattr(run, "_ENDING_SECONDS", 0.3)
    bodies = [BODY.encode(), json.dumps({**json.loads(BODY), "stream": True}).encode()] * 2  # some of them wait
    with ThreadPoolExecutor(4) as pool:
        with slow(study, monkeypatch, 0.2) as (port, live):
            asked = [pool.submit(request, port, "POST", "/v1/completions", body, seconds=20) for body in bodies]
            until(lambda: len(live._jobs) == 4 and any(job.claim.cached for job in live._jobs))
        for status, _, answer in (one.result() for one in asked):
            assert status == 200 and b'"ended":"shutdown"' in answer.replace(b" ", b"")


def test_who_leaves_the_queue_gives_up_the_place(study, monkeypatch):
    with slow(study, monkeypatch, 0.05) as (port, live):
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost:{port}\r\nContent-Type: application/json\r\n"
        connections = [socket.create_connection(("127.0.0.1", port), timeout=10) for _ in range(live._workers + 5)]
        for at, connection in enumerate(connections, 1):
            connection.sendall(f"{head}Content-Length: {len(BODY)}\r\n\r\n{BODY}".encode())
            until(lambda at=at: len(live._jobs) == at)
        for connection in connections[live._workers :]:
            connection.close()
        until(lambda: len(live._jobs) == live._workers)  # while the others still run
        assert live.meter.counts["cancelled"] == 5 and live.meter.counts["done"] == 0
        for connection in connections:
            connection.close()
        until(lambda: not live._jobs)


def test_an_idle_server_with_a_model_stops_at_once(study):
    with process(study) as (server, port):
        assert request(port, "GET", "/api/state")[0] == 200
        start = time.monotonic()
        server.send_signal(signal.SIGINT)
        assert server.wait(timeout=10) == 0 and time.monotonic() - start < 2.5  # 0.3 s on a machine of its own
        assert server.stderr.read().endswith(STOPPING)


def test_who_asks_for_another_protocol_is_answered_in_http(decisions, caplog):
    head = f"GET /api/state HTTP/1.1\r\nHost: localhost:{decisions}\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n"
    assert exchange(decisions, head.encode())[0] == 200 and not caplog.records


def test_ctrl_c_is_no_failure_either(study):
    with process(study, "--no-model") as (server, _):
        server.send_signal(signal.SIGINT)
        assert server.wait(timeout=10) == 0 and server.stderr.read() == STOPPING


def takes_no_more(port):
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return True
    return False


@pytest.mark.parametrize("is_read", [True, False])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_ends_it_at_once_in_one_line(study, number, code, is_read):
    with process(study, "--no-model") as (server, port), socket.create_connection(("127.0.0.1", port)) as connection:
        head = f"POST /api/ratio HTTP/1.1\r\nHost: localhost:{port}\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())  # it waits for the rest of a body
        assert request(port, "GET", "/api/state")[0] == 200  # the half was read before this
        start = time.monotonic()
        server.send_signal(number)
        until(lambda: takes_no_more(port))
        assert server.poll() is None
        if not is_read:
            server.stderr.close()
        server.send_signal(number)
        assert server.wait(timeout=10) == code and time.monotonic() - start < 0.9 * run._STOP_SECONDS
        assert not is_read or server.stderr.read() == f"{STOPPING}error: stopped; what was not answered is lost\n"
