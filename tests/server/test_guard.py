import json
import socket
import sys

import pytest

from http_client import answer, exchange, request, strict
from ppf.server.guard import Access

GET = ["/", "/static/index.html", "/api/study", "/api/policy?ratio=0.3", "/api/state", "/metrics", "/v1/models", "/nothing"]
POST = ["/api/ratio", "/v1/completions", "/v1/chat/completions", "/nothing"]
BODY = b'{"ratio":0.3}'


def is_refusal(found, *statuses):
    """An error of ours in one line, with every header that an answer must have and none that lets others read it."""
    status, headers, body = found
    error = strict(body)["error"]
    assert status in statuses, (status, body)
    assert set(error) == {"message", "type", "code"} and "\n" not in error["message"] and error["message"].count("; ") >= 2
    guarded(headers)
    return True


def guarded(headers):
    policy = headers["content-security-policy"]
    assert "default-src 'self'" in policy and "frame-ancestors 'none'" in policy and "base-uri 'none'" in policy
    assert "script-src" not in policy and headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer" and headers["cache-control"] == "no-store"
    assert not [name for name in headers if name.startswith("access-control")]


# --- who is asked: no foreign name can be rebound to this server ---

BAD_HOSTS = [
    "evil.com", "127.0.0.1.evil.com:{port}", "localhost.evil.com:{port}", "10.evil.com", "127.0.0.1@evil.com:{port}", "",
    "0.0.0.0:{port}", "127.0.0.1:1", "localhost:{port}0", "[::2]:{port}", "127.0.0.1:{port}, evil.com", "localhost.:{port}",
    "user@127.0.0.1:{port}", "127.1:{port}", "[127.0.0.1]:{port}x", "127.0.0.1",
]  # fmt: skip


@pytest.mark.parametrize("host", BAD_HOSTS)
def test_other_hosts_are_refused_on_every_route(decisions, host):
    host = host.format(port=decisions)
    for path in GET:
        assert is_refusal(request(decisions, "GET", path, Host=host), 400)
    for path in POST:
        assert is_refusal(request(decisions, "POST", path, BODY, Host=host), 400)


@pytest.mark.parametrize("host", ["127.0.0.1:{port}", "localhost:{port}", "LocalHost:{port}", "[::1]:{port}", "[0:0::1]:{port}"])
def test_the_names_of_this_machine_are_answered(decisions, host):
    status, headers, body = request(decisions, "GET", "/api/state", Host=host.format(port=decisions))
    assert status == 200 and strict(body)["fits"] == 1
    guarded(headers)


def test_two_hosts_or_none_or_a_whole_address_are_refused(decisions):
    own = f"Host: 127.0.0.1:{decisions}\r\n"
    heads = [
        f"GET /api/study HTTP/1.1\r\n{own}Host: evil.com\r\nConnection: close\r\n\r\n",
        "GET /api/study HTTP/1.1\r\nConnection: close\r\n\r\n",
        "GET /api/study HTTP/1.0\r\n\r\n",
        f"GET http://evil.com/api/study HTTP/1.1\r\n{own}Connection: close\r\n\r\n",
    ]
    for head in heads:
        status, _, body = exchange(decisions, head.encode())
        assert status in (400, 404) and b"prunable" not in body


def test_a_packed_body_is_refused(live):
    for coding, status in (("gzip", 415), ("identity, br", 415), ("identity", 200)):
        assert request(live[0], "POST", "/api/ratio", b'{"ratio":0}', Content_Encoding=coding)[0] == status


# --- who asks: no page of another site ---

FOREIGN = [
    {"Origin": "http://evil.com"}, {"Origin": "null"}, {"Sec_Fetch_Site": "cross-site"}, {"Sec_Fetch_Site": "same-site"},
    {"Referer": "http://evil.com/page"}, {"Origin": "http://127.0.0.1:1"}, {"Origin": "http://127.0.0.1.evil.com:{port}"},
    {"Origin": "http://localhost:{port}@evil.com"}, {"Origin": "ftp://127.0.0.1:{port}"}, {"Origin": "127.0.0.1:{port}"},
]  # fmt: skip


@pytest.mark.parametrize("headers", FOREIGN)
@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
def test_pages_of_other_sites_change_nothing(live, method, headers):
    port, served = live
    given = {name: value.format(port=port) for name, value in headers.items()}
    for path in ("/api/ratio", "/v1/completions", "/"):
        assert is_refusal(request(port, method, path, BODY, **given), 403)
    assert served.live.size.decision.asked == 0


@pytest.mark.parametrize("headers", FOREIGN[:5])
def test_pages_of_other_sites_read_nothing(decisions, headers):
    for path in GET[2:]:
        assert is_refusal(request(decisions, "GET", path, **headers), 403)


def test_a_preflight_is_refused(decisions):
    asked = {"Origin": "http://evil.com", "Access_Control_Request_Method": "POST"}
    assert is_refusal(request(decisions, "OPTIONS", "/api/ratio", **asked), 403)
    assert is_refusal(request(decisions, "OPTIONS", "/api/ratio"), 405)


def test_a_link_from_elsewhere_leads_to_the_page(decisions):
    for path in GET[:2]:
        assert request(decisions, "GET", path, Sec_Fetch_Site="cross-site")[0] == 200


def test_the_own_page_may_ask(live):
    port, _ = live
    own = {"Origin": f"http://localhost:{port}", "Sec_Fetch_Site": "same-origin", "Host": f"localhost:{port}"}
    assert request(port, "POST", "/api/ratio", b'{"ratio":0}', **own)[0] == 200
    assert request(port, "GET", "/api/study", **own)[0] == 200


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", None, "x"])
def test_only_json_is_read(live, kind):
    port, served = live
    for path in POST:
        assert is_refusal(request(port, "POST", path, BODY, Content_Type=kind), 415)
    assert served.live.size.decision.asked == 0


# --- how much ---


def test_too_large_a_body_is_refused_without_being_read(decisions):
    for size in ("65537", "5000000", "10000000000", "9" * 400, "-1", "1e3"):
        status, _, _ = request(decisions, "POST", "/api/ratio", Content_Length=size, Content_Type="application/json")
        assert status in (400, 413)
    assert is_refusal(request(decisions, "POST", "/api/ratio", b" " * 65537), 413)
    assert request(decisions, "POST", "/api/ratio", b" " * 65536)[0] == 400


def test_chunks_without_end_are_cut_off(decisions):
    head = f"POST /api/ratio HTTP/1.1\r\nHost: localhost:{decisions}\r\nTransfer-Encoding: chunked\r\n\r\n"
    with socket.create_connection(("127.0.0.1", decisions), timeout=5) as connection:
        connection.sendall(head.encode())
        try:
            for _ in range(100):
                connection.sendall(b"1000\r\n" + b" " * 4096 + b"\r\n")
        except OSError:
            pass  # cut off while sending
        else:
            assert is_refusal(answer(connection), 413)


def test_heads_that_are_too_large_are_refused(decisions):
    for more in ("X-Long: " + "a" * 200_000, "\r\n".join(f"X-{index}: y" for index in range(10_000))):
        try:
            status, _, body = exchange(decisions, f"GET / HTTP/1.1\r\nHost: localhost:{decisions}\r\n{more}\r\n\r\n".encode())
        except ConnectionError:
            continue  # closed while the rest was sent
        assert status in (400, 431) and b"<!doctype" not in body
    assert is_refusal(request(decisions, "GET", "/api/policy?ratio=" + "0" * 5000), 414)


def test_deep_and_long_json_is_refused(decisions):
    for body in (b"[" * 2000 + b"]" * 2000, b'{"ratio":' + b"[" * 100 + b"]" * 100 + b"}", b'{"ratio":' + b"9" * 5000 + b"}"):
        assert is_refusal(request(decisions, "POST", "/api/ratio", body), 400)


# --- which path ---

PATHS = [
    "/static/../app.py", "/static/..%2fapp.py", "/static/%2e%2e/app.py", "/static/%2e%2e%2fapp.py", "/static/%252e%252e%252fapp.py",
    "/static/..\\app.py", "/static/..%5capp.py", "//etc/passwd", "/static//etc/passwd", "/static/%2fetc%2fpasswd", "/etc/passwd",
    "/static/index.html%00", "/static/index.html%00.png", "/static/%00", "/static/C:\\windows\\win.ini", "/static/C:%5cwindows",
    "/static/\\\\host\\share", "/static/%5c%5chost%5cshare", "/static/index.html#/../app.py", "/static/", "/static", "/static/.",
    "/static/..", "/static/" + "a" * 3000, "/static/../../../../../../etc/passwd", "/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd",
    "/api/study/../../app.py", "/api/..%2f..%2fapp.py", "/v1/models/../../../etc/passwd", "/v1/models/..%2f..%2fetc%2fpasswd",
    "/static/index.html/", "/static/index.html/..", "/static/INDEX.HTML", "/static/~root", "/static/%c0%ae%c0%ae/app.py",
    "/static/....//app.py", "/static/index.html;/app.py", "/static/%ff%fe", "/.git/config",
]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_paths_lead_nowhere_else(decisions, path):
    status, headers, body = request(decisions, "GET", path)
    assert status in (400, 404), path
    assert b"root:" not in body and b"import" not in body
    if status == 404:
        assert is_refusal((status, headers, body), 404)


def test_no_file_is_opened_for_a_request(decisions):
    opened, watching = [], [True]
    sys.addaudithook(lambda event, args: opened.append(args[0]) if event == "open" and watching else None)  # can never be removed
    try:
        for path in (*GET, *PATHS):
            request(decisions, "GET", path)
    finally:
        watching.clear()
    assert not opened


# --- the token ---


def test_a_server_beyond_this_machine_knows_addresses_but_no_foreign_names():
    access = Access(frozenset({"localhost", "127.0.0.1", "box"}), 8000, any_address=True)
    for host in ("10.1.2.3:8000", "[fe80::1]:8000", "box:8000", "BOX:8000"):
        assert access.knows(host)
    for host in ("evil.com:8000", "10.1.2.3:8001", "0.0.0.0:8000", "[::]:8000", "10.1.2.3.evil.com:8000"):
        assert not access.knows(host)


def test_ports_that_go_without_saying():
    assert Access(frozenset({"localhost"}), 80).knows("localhost")
    assert Access(frozenset({"localhost"}), 80).is_own_origin("http://localhost")
    assert Access(frozenset({"localhost"}), 443).is_own_origin("https://localhost")
    assert not Access(frozenset({"localhost"}), 8000).knows("localhost")


@pytest.mark.parametrize("given", [None, "Bearer", "Bearer wrong", "Basic {token}", "Bearer {token}x", "{token}", "Bearer \xff"])
def test_without_the_token_nothing_but_the_page_is_answered(guarded_port, given):
    port, token = guarded_port
    given = given and given.format(token=token)
    for path in GET[2:]:
        found = request(port, "GET", path, Authorization=given)
        assert is_refusal(found, 401) and found[1]["www-authenticate"] == "Bearer"
    for path in POST:
        assert is_refusal(request(port, "POST", path, BODY, Authorization=given), 401)
    assert request(port, "GET", "/", Authorization=given)[0] == 200


def test_with_the_token_it_answers(guarded_port):
    port, token = guarded_port
    for word in ("Bearer", "bearer"):
        status, _, body = request(port, "GET", "/api/policy?ratio=0.3", Authorization=f"{word} {token}")
        assert status == 200 and json.loads(body)["ratio"]["asked"] == 0.3
