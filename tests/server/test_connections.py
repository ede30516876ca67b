import contextlib
import re
import signal
import socket
import time
from collections import Counter

import pytest

from http_client import answer, exchange, request, strict
from ppf.server import guard, run
from server_runs import process, running


def bad_requests(port):
    counts = re.findall(rb'^ppf_responses_total{status="400"} ([0-9]+)$', request(port, "GET", "/metrics")[2], re.MULTILINE)
    return int(counts[0]) if counts else 0


@pytest.mark.parametrize(
    "head", ["no http at all", "GET /\r\n", "GET / HTTP/1.1\r\nno colon", "GET / HTTP/1.1\r\nX: " + "a" * 40_000]
)
def test_what_is_no_http_is_answered_in_json_too(study, decisions, head):
    before = bad_requests(decisions)
    status, headers, body = exchange(decisions, f"{head}\r\n\r\n".encode())
    assert status == 400 and strict(body)["error"]["code"] == "bad_http" and headers["content-type"] == "application/json"
    assert headers["connection"] == "close" and headers["x-content-type-options"] == "nosniff"
    assert bad_requests(decisions) == before + 1


@pytest.fixture
def hasty(monkeypatch):
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.3)
    monkeypatch.setattr(run, "_SILENT_SECONDS", 0.3)


def left(connections):
    """How many the server has not closed yet."""
    open_ones = 0
    for connection in connections:
        connection.settimeout(0.0)
        try:
            while connection.recv(65536):
                pass
        except BlockingIOError:
            open_ones += 1
        except OSError:
            pass
    return open_ones


@pytest.mark.parametrize("part", ["", "GET /api", "GET / HTTP/1.1\r\nHost: x\r\n", "body"])
def test_clients_that_send_half_are_closed_in_time(study, hasty, caplog, part):
    with running(study, no_model=True) as (port, _), contextlib.ExitStack() as stack:
        if part == "body":
            head = f"POST /api/ratio HTTP/1.1\r\nHost: localhost:{port}\r\nContent-Type: application/json\r\n"
            part = f"{head}Content-Length: 100\r\n\r\n{{"
        slow = [stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(60)]
        for connection in slow:
            connection.sendall(part.encode())
        start = time.monotonic()
        assert request(port, "GET", "/api/state")[0] == 200
        end = time.monotonic() + 6
        while left(slow) and time.monotonic() < end:
            time.sleep(0.05)
        assert not left(slow) and time.monotonic() - start < 6
    assert "Traceback" not in caplog.text and len(caplog.records) <= 60


def test_half_a_second_request_is_closed_too(study, hasty):
    with running(study, no_model=True) as (port, _), socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        whole = f"GET /api/state HTTP/1.1\r\nHost: localhost:{port}\r\n\r\n"
        connection.sendall(whole.encode())
        assert answer(connection)[2].startswith(b'{"live":false,')
        connection.sendall(whole[:20].encode())
        assert connection.recv(65536) == b""


def test_clients_that_leave_in_mid_body_leave_no_trace(study, caplog):
    with running(study, no_model=True) as (port, _):
        for _ in range(20):
            with socket.create_connection(("127.0.0.1", port)) as connection:
                head = f"POST /api/ratio HTTP/1.1\r\nHost: localhost:{port}\r\nContent-Type: application/json\r\n"
                connection.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
        time.sleep(0.1)
        assert request(port, "GET", "/api/state")[0] == 200
    assert not caplog.records


def test_more_connections_than_it_takes_are_turned_away(study, monkeypatch):
    monkeypatch.setattr(run, "_CONNECTIONS", 10)
    with running(study, no_model=True) as (port, _), contextlib.ExitStack() as stack:
        for _ in range(10):
            stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        time.sleep(0.1)
        status, headers, body = exchange(
            port, f"GET /api/study HTTP/1.1\r\nHost: localhost:{port}\r\nConnection: close\r\n\r\n".encode()
        )
        assert status == 503 and strict(body)["error"]["code"] == "busy"
        assert headers["retry-after"] == "1" and headers["connection"] == "close" and headers["x-content-type-options"] == "nosniff"
        stack.close()
        time.sleep(0.1)
        assert request(port, "GET", "/api/state")[0] == 200


@pytest.mark.slow
def test_three_hundred_slow_clients_hold_nobody_up(study):
    with process(study, "--no-model") as (server, port), contextlib.ExitStack() as stack:
        half = (
            f"POST /api/ratio HTTP/1.1\r\nHost: localhost:{port}\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{{"
        )
        whole = f"GET /api/state HTTP/1.1\r\nHost: localhost:{port}\r\n\r\n".encode()
        first = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=5))
        first.sendall(whole)
        assert answer(first)[0] == 200
        start, times, later = time.monotonic(), [], Counter()
        slow = [stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=5)) for _ in range(300)]
        for connection in slow:
            connection.sendall(half.encode())
        while (gone := time.monotonic() - start) < 20 and left(slow):
            begun = time.perf_counter()
            first.sendall(whole)  # a connection from before is answered all along
            assert answer(first)[0] == 200
            times.append(time.perf_counter() - begun)
            later[request(port, "GET", "/api/state")[0]] += 1  # one that comes later is turned away until there is room
            time.sleep(0.05)
        worst = sorted(times)[int(0.99 * len(times))]
        print(f"all closed after {gone:.1f} s; p99 {1e3 * worst:.1f} ms of {len(times)}; new connections: {dict(later)}")
        assert gone <= 15 and worst <= 0.2 and set(later) <= {200, 503}
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=10) == 0 and server.stderr.read().count("\n") <= 301
