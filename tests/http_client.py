"""Requests as bytes, so that what no decent client sends can be sent; and a JSON reader that takes nothing but JSON."""

import json
import socket
from typing import Any


def refuse(name: str) -> Any:
    raise AssertionError(f"{name} is no JSON")


def strict(body: bytes | str) -> Any:
    """Reads JSON without NaN and infinities."""
    return json.loads(body, parse_constant=refuse)


def exchange(port: int, raw: bytes, seconds: float = 5.0) -> tuple[int, dict[str, str], bytes]:
    """Sends bytes; status, headers and body of the answer, which must close the connection or have a length."""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection:
        connection.sendall(raw)
        return answer(connection)


def answer(connection: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """Reads one answer."""
    got = b""
    while b"\r\n\r\n" not in got and (chunk := connection.recv(65536)):
        got += chunk
    head, _, body = got.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    while len(body) < int(headers.get("content-length", 10**9)) and (chunk := connection.recv(65536)):
        body += chunk
    return int(first.split()[1]), headers, body


def request(
    port: int, method: str, path: str, body: bytes = b"", seconds: float = 5.0, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    """One request with ordinary headers, each of which may be replaced or, as None, left out."""
    usual: dict[str, str | None] = {"Host": f"127.0.0.1:{port}", "Connection": "close"}
    if body:
        usual |= {"Content-Type": "application/json", "Content-Length": str(len(body))}
    given = usual | {name.replace("_", "-"): value for name, value in headers.items()}
    head = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in given.items() if value is not None)]
    return exchange(port, "\r\n".join([*head, "", ""]).encode("latin-1") + body, seconds)
