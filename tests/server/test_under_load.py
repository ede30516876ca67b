"""Many requests at once, beside whatever else the machine does. benchmarks/live.py and load.py are the full measure."""

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import ppf
import tiny_models
from fit_runs import SETTINGS
from http_client import request, strict
from ppf.config import Target
from ppf.decide import Decider
from server_runs import process


def resident(pid):
    """Bytes of memory."""
    with open(f"/proc/{pid}/statm", encoding="utf-8") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextlib.contextmanager
def eight(port, ratios):
    """Eight connections that ask for ratios, again and again until the block ends or ``ratios`` do; yields times and answers."""
    times, answers, failed, stop = [], [], [], threading.Event()

    def ask(number):
        head = f" HTTP/1.1\r\nHost: localhost:{port}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            for ratio in ratios(number):
                if stop.is_set():
                    return
                start = time.perf_counter()
                connection.sendall(f"GET /api/policy?ratio={ratio}{head}".encode())
                got = b""
                while b"\r\n\r\n" not in got or not got.endswith(b"}"):
                    got += connection.recv(65536)
                times.append(time.perf_counter() - start)
                if got.startswith(b"HTTP/1.1 200"):
                    answers.append((ratio, strict(got.partition(b"\r\n\r\n")[2])))
                else:
                    failed.append(got)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    try:
        yield times, answers, threads
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failed


def any_ratios(number):
    """Without an end."""
    rng = np.random.default_rng(number)
    while True:
        yield round(float(rng.uniform(0.02, 0.6)), 6)


def p99(times):
    return sorted(times)[int(0.99 * len(times))]


def test_eight_connections_at_once_are_answered_at_speed_and_without_growing(study):
    with process(study, "--no-model") as (server, port):
        before = resident(server.pid)
        with eight(port, lambda number: [(number * 60 + index) / 1000 for index in range(60)]) as (times, answers, threads):
            for thread in threads:
                thread.join()
        assert len(answers) == 480
        for ratio, record in answers:
            assert record["ratio"]["asked"] == ratio <= record["ratio"]["met"]
        assert p99(times) < 1.0  # 50 ms on a machine of its own
        assert resident(server.pid) - before < 30e6


def test_what_is_too_big_neither_grows_the_server_nor_holds_others_up(study):
    head = "POST /api/ratio HTTP/1.1\r\nHost: localhost:{}\r\nContent-Type: application/json\r\n"
    with process(study, "--no-model") as (server, port):
        request(port, "GET", "/api/state")
        chunks = b"".join(b"1000\r\n" + b" " * 4096 + b"\r\n" for _ in range(100))
        parts = [
            b"Content-Length: 5000000\r\n\r\n" + b" " * 5_000_000, b"Content-Length: 10000000000\r\n\r\n" + b" " * 100_000,
            b"Transfer-Encoding: chunked\r\n\r\n" + chunks, b"X-Long: " + b"a" * 200_000 + b"\r\n\r\n",
        ]  # fmt: skip
        before, times = resident(server.pid), []
        for part in parts * 3:
            with socket.create_connection(("127.0.0.1", port), timeout=5) as connection, contextlib.suppress(OSError):
                connection.sendall(head.format(port).encode() + part)  # cut off while sending
            start = time.perf_counter()
            assert request(port, "GET", "/api/state")[0] == 200
            times.append(time.perf_counter() - start)
        assert max(times) < 1.0 and resident(server.pid) - before < 10e6  # 0.2 s on a machine of its own
        server.terminate()
        *said, last = server.stderr.read().splitlines()
        assert server.wait(timeout=10) == 0 and set(said) <= {"Invalid HTTP request received."} and len(said) <= 3
        assert last.startswith("stopping; ")


@pytest.mark.slow
def test_policies_are_answered_while_the_study_is_fitted_anew_and_exported(tmp_path):
    text, study = tmp_path / "text.txt", tmp_path / "study"
    model = tiny_models.save(tmp_path / "model", "llama-mha")
    text.write_text(" ".join(f"w{index}" for index in np.random.default_rng(0).integers(3, tiny_models.VOCAB, 4000)))
    ppf.fit(model, study=study, text=str(text), quiet=True, workers=1, **SETTINGS)
    flags = [word for name, value in SETTINGS.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    again = ["fit", str(model), "--study", str(study), "--text", str(text), "--workers", "1", "--predictor", "additive", *flags]
    fits = [Decider(study)]
    with process(study, "--no-model") as (_, port):
        for command in (["prune", str(study), "--ratio", "0.3", "--out", str(tmp_path / "out")], again):
            with eight(port, any_ratios) as (times, answers, _):
                subprocess.run([sys.executable, "-m", "ppf", *command], check=True, capture_output=True)
                time.sleep(2)
            fits.append(Decider(study))
            print(f"{command[0]}: {len(times)} answers, p99 {1e3 * p99(times):.1f} ms")
            known = [[one.decide(Target(ratio=ratio)).allocation.kept.tolist() for one in fits] for ratio, _ in answers]
            kept = [[site["kept"] for site in record["kept"]] for _, record in answers]
            assert all(one in either for one, either in zip(kept, known, strict=True)) and len(answers) > 100
            assert p99(times) < 1.0  # 100 ms on a machine of its own
        assert strict(request(port, "GET", "/api/state")[2])["fits"] == 2 and len({one["fit"] for _, one in answers}) == 2
