"""Starting and stopping: what can be refused is refused before anything heavy is loaded."""

import asyncio
import contextlib
import ipaddress
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NoReturn

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ppf.config import ServeConfig
from ppf.config.serve import is_loopback
from ppf.decide import Decider
from ppf.errors import InputError, InUseError, ResourceError
from ppf.server.app import LivePart, Service, create_app
from ppf.server.guard import HEADER_BYTES, HEADERS, Access
from ppf.server.wire import dump, error_body

_SILENT_SECONDS = 10.0
_ENDING_SECONDS, _STOP_SECONDS = 1.5, 4
_CONNECTIONS = 200


class _Server(uvicorn.Server):
    """Says where it serves once a signal can stop it, and stopping it by one is no failure."""

    should_exit: bool
    announcement = ""
    close: Callable[[], None]

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(self.announcement, end="", flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """What is not answered soon is ended, so that its client hears of it."""
        ending = asyncio.get_running_loop().call_later(_ENDING_SECONDS, self.close)
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()

    def handle_exit(self, sig: int, frame: Any) -> None:
        if self.should_exit:
            _end_now(sig, frame)
        _say(b"stopping; what is not answered soon is ended\n")
        self.should_exit = True


class _Protocol(H11Protocol):
    """Closes connections on which no request begins for ten seconds, whether they send nothing or half a head.

    Of more connections than the server takes, the last ones are turned away at their first request.
    """

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > _CONNECTIONS:
            self.app = self.config.loaded_app.turn_away
        self._last_cycle: Any = None
        self._look = self.loop.call_later(_SILENT_SECONDS, self._close_if_silent)

    def connection_lost(self, exc: Exception | None) -> None:
        self._look.cancel()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP is answered as everything else is."""
        words = f"a request must be HTTP/1.1, with a head of at most {HEADER_BYTES} bytes; another came; send one"
        body = dump(error_body(400, words, "bad_http"))
        head = {**HEADERS, "Content-Type": "application/json", "Content-Length": str(len(body)), "Connection": "close"}
        start = h11.Response(status_code=400, reason=b"Bad Request", headers=list(head.items()))
        for event in (start, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.config.loaded_app.counts[400] += 1
        self.transport.close()

    def _unsupported_upgrade_warning(self) -> None:
        """Who asks for another protocol is answered in this one, and the log is not told to install it."""

    def _close_if_silent(self) -> None:
        is_answering = self.cycle is not None and not self.cycle.response_complete
        if not is_answering and self.cycle is self._last_cycle:
            self.transport.close()
            return
        self._last_cycle = self.cycle
        self._look = self.loop.call_later(_SILENT_SECONDS, self._close_if_silent)


def serve(config: ServeConfig, open_live: Callable[[ServeConfig, Decider], LivePart] | None) -> None:
    """Serves until a signal comes.

    Args:
        config: What and where.
        open_live: Opens the live model; None serves decisions alone.

    Raises:
        InputError: No fitted study, or an address beyond loopback without a token.
        DamagedError: An artefact of the study is not whole.
        InUseError: The port is taken.
    """
    config = _with_token(config)
    decider = Decider(config.study)
    mark = decider.mark
    with listen(config) as listener:
        access = access_of(config, listener.getsockname()[1])
        live = None if open_live is None else open_live(config, decider)
        server = server_of(Service(decider, live, config.decides_nested, mark), access)
        server.announcement = f"serving http://{_shown(config.host)}:{access.port}\n"
        if threading.current_thread() is threading.main_thread():
            # uvicorn puts them back when it has stopped; threads that end their last token keep the process a while longer
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, _end_now)
        server.run([listener])
    if threading.current_thread() is threading.main_thread():
        _leave()


def _leave() -> NoReturn:
    """Ends the process without taking it apart, which takes seconds where a model is in memory; all is answered or ended."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(0)


def _end_now(number: int, _: Any) -> NoReturn:
    """A second signal ends the process at once, whatever its threads do."""
    _say(b"error: stopped; what was not answered is lost\n")
    os._exit(128 + number)


def _say(line: bytes) -> None:
    with contextlib.suppress(OSError):  # nobody reads it any more
        os.write(2, line)


def server_of(service: Service, access: Access) -> _Server:
    """A server that keeps to its limits; ``run`` it with a socket that listens."""
    server = _Server(
        uvicorn.Config(
            create_app(service, access),
            http=_Protocol,
            ws="none",
            lifespan="on",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            h11_max_incomplete_event_size=HEADER_BYTES,
            timeout_graceful_shutdown=_STOP_SECONDS,
        )
    )
    server.close = service.live.close if service.live else lambda: None
    return server


def access_of(config: ServeConfig, port: int) -> Access:
    """Who may ask a server that listens there."""
    hosts = {"localhost", "127.0.0.1", "::1"}
    if is_loopback(config.host):
        return Access(frozenset(hosts | {_shortest(config.host)}), port, token=config.token)
    hosts |= {_shortest(config.host), socket.gethostname().lower()}
    return Access(frozenset(hosts), port, any_address=True, token=config.token)


def _with_token(config: ServeConfig) -> ServeConfig:
    if config.token is None and os.environ.get("PPF_TOKEN"):
        config = replace(config, token=os.environ["PPF_TOKEN"])
    if config.token is None and not is_loopback(config.host):
        raise InputError(
            f"an address beyond this machine must have a --token; {config.host} came without; give one or set PPF_TOKEN"
        )
    return config


def listen(config: ServeConfig) -> socket.socket:
    """A socket that listens, so that a taken port is found before anything is loaded.

    Raises:
        InputError: No such address.
        InUseError: The port is taken.
        ResourceError: The system refuses it.
    """
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    # Named as TCP, or asyncio leaves Nagle's algorithm on: each answer would wait 40 ms for the client's acknowledgement.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
        listener.listen(_CONNECTIONS)
    except OSError as error:
        listener.close()
        place = f"{config.host}:{config.port}"
        if isinstance(error, socket.gaierror) or error.errno is None:
            raise InputError(f"--host must be an address of this machine; {config.host!r} came; 127.0.0.1 is usual") from error
        if error.errno in (48, 98):
            raise InUseError(f"{place} must be free; another process listens there; choose another --port") from error
        raise ResourceError(f"{place} must be an address to listen at; {error.strerror}; choose another") from error
    return listener


def _shortest(host: str) -> str:
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return host.lower()


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host
