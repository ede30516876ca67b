"""A Ray cluster: workers that it places, and places again when a node dies. Ray is imported when it is asked for, never before.

Lines of text travel, as to a local worker, and the text artefact as bytes in the cluster's store; a node reads the model by
the path or hub id by which it is known here, and answers only if it is the same one. Which masks are to be measured again
is decided here: Ray itself repeats nothing.
"""

import contextlib
import importlib
import json
import logging
import os
import socket
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ppf.errors import DamagedError, InputError, PPFError, ResourceError
from ppf.llm.engines.pool import Pool, Worker
from ppf.llm.engines.service import ENVIRONMENT, READY, Service, to_refusal
from ppf.llm.weights import first_line
from ppf.space.layout import Layout

_PATIENCE = 600.0
_OWN = {"address": "local", "include_dashboard": False, "object_store_memory": 2**27}


@dataclass(frozen=True)
class Cluster:
    """Which cluster, and what a worker takes of it.

    Attributes:
        address: Of a running one, as Ray takes it; None starts one on this machine, which ends with the engine.
        workers: How many; None means as many as there is room for.
        gpus: Of each worker, in [0, 1]; 0 measures on a CPU.
    """

    address: str | None
    workers: int | None
    gpus: float


class RayEngine(Pool["_Actor"]):
    """Workers on a Ray cluster, each with the model.

    Args:
        model: Folder, hub id or ``ref-a``, as every node knows it.
        digest: Of the dense model.
        text: Artefact of the text to measure on, on this machine.
        layout: Of the dense model.
        dtype: Torch dtype to measure in, by name.
        tokens_per_batch: As in ``Bench``.
        cluster: Where.

    Attributes:
        where: One line about the cluster.

    Raises:
        InputError: This process is connected to another cluster already.
        ResourceError: Ray is not installed, the cluster does not answer, or it has no room for a worker.
    """

    def __init__(
        self, model: str, digest: str, text: Path, layout: Layout, dtype: str, tokens_per_batch: int, cluster: Cluster
    ) -> None:
        super().__init__()
        self._ray = import_ray(cluster.address)
        self._is_ours = not self._ray.is_initialized()
        if not self._is_ours:
            _check_connected(self._ray, cluster.address)
        setup = {
            "folder": model,
            "digest": digest,
            "layout": layout.to_json(),
            "dtype": dtype,
            "device": "cuda" if cluster.gpus else "cpu",
            "tokens_per_batch": tokens_per_batch,
            "version": version("ppf"),
        }
        try:
            if self._is_ours:
                _connect(self._ray, cluster)
            count = cluster.workers or room(self._ray.nodes(), cluster.gpus)
            if not room(self._ray.nodes(), cluster.gpus):
                needed = f"one CPU and {cluster.gpus:g} GPU" if cluster.gpus else "one CPU"
                raise ResourceError(f"the Ray cluster must have {needed} for a worker; no node has; add one")
            is_started = self._is_ours and not cluster.address
            own = ": on this machine for this fit, its ports open to who holds its token" if is_started else ""
            self.where = f"Ray at {self._ray.get_runtime_context().gcs_address}{own}, workers: {count}"
            kept = self._ray.put(text.read_bytes())
            options = {"num_cpus": 1, "num_gpus": cluster.gpus, "scheduling_strategy": "SPREAD", "max_restarts": 0}
            made = self._ray.remote(Measurer).options(runtime_env={"env_vars": ENVIRONMENT}, **options)
            for _ in range(count):
                self.workers.append(_Actor(self._ray, made, json.dumps(setup), kept))
        except BaseException:
            self.close()
            raise

    def heard(self) -> Sequence["_Actor"]:
        """See ``Pool``.

        Raises:
            ResourceError: The cluster places no worker.
        """
        asked = {worker.answer: worker for worker in self.workers if worker.answer is not None}
        patience = None if any(worker.is_ready for worker in self.workers) else _PATIENCE
        ready, _ = self._ray.wait(list(asked), num_returns=1, timeout=patience)
        if not ready:
            raise ResourceError(
                f"the Ray cluster must have room for a worker; none started in {_PATIENCE:.0f} s; see ray status, add nodes"
            )
        return [asked[answer] for answer in ready]

    def close(self) -> None:
        """Ends the workers, and what was started for them."""
        super().close()
        if self._is_ours:
            self._ray.shutdown()


class _Actor(Worker):
    """One worker, wherever Ray placed it."""

    def __init__(self, ray: Any, made: Any, setup: str, text: Any) -> None:
        super().__init__()
        self._ray, self._made, self._setup, self._text = ray, made, setup, text
        self.start()

    def start(self) -> None:
        self._actor = self._made.remote()
        self.answer = self._actor.open.remote(self._setup, self._text)

    def send(self, question: str) -> None:
        self.answer = self._actor.answer.remote(question)

    def receive(self) -> str | None:
        try:
            line = self._ray.get(self.answer)
        except self._ray.exceptions.RayError as error:
            self._error = error
            return None
        self.answer = None
        return line

    def last_words(self) -> tuple[str, bool]:
        """See ``Worker``. An error that was raised would be raised again; whatever else Ray reports may not come again."""
        raised = isinstance(self._error, self._ray.exceptions.RayTaskError)
        error = self._error.cause if raised else self._error
        return first_line(error), raised

    def close(self) -> None:
        with contextlib.suppress(self._ray.exceptions.RayError, ValueError):  # it or its cluster is gone
            self._ray.kill(self._actor)


class Measurer:
    """What Ray runs on a node: a ``Service``, opened by the first call."""

    def open(self, setup: str, text: bytes) -> str:
        """Opens the model; refuses where the node has another one by that name, or another version of ppf.

        Args:
            setup: The set-up line.
            text: Bytes of the text's artefact.
        """
        try:
            self._open(json.loads(setup), text)
        except PPFError as error:
            return to_refusal(error)
        return READY

    def _open(self, asked: dict[str, Any], text: bytes) -> None:
        if asked["version"] != version("ppf"):
            raise DamagedError(f"every node must have ppf {asked['version']}; one has {version('ppf')}; install it there")
        with tempfile.NamedTemporaryFile() as file:
            Path(file.name).write_bytes(text)
            self._service = Service({**asked, "text": file.name})
        if self._service.digest != asked["digest"]:
            raise DamagedError(f"every node must have the same {asked['folder']}; one has another model there; copy it")

    def answer(self, question: str) -> str:
        """See ``Service``."""
        try:
            return self._service.answer(question)
        except PPFError as error:
            return to_refusal(error)


def import_ray(address: str | None) -> Any:
    """The package, told to be quiet and to report nothing.

    Args:
        address: Of the cluster; None means one of our own.

    Raises:
        ResourceError: It is not installed.
        InputError: A cluster of our own would let everyone in.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_worker_niceness", "0")  # else whatever runs beside a Ray of our own goes before its workers
    try:
        ray = importlib.import_module("ray")
    except ImportError as error:
        raise ResourceError("--engine ray needs the package ray; it is missing; pip install 'ppf[ray]'") from error
    if address is None and os.environ.get("RAY_AUTH_MODE", "token") != "token":
        raise InputError(
            f"Ray on this machine must ask for a token, since others can reach it; RAY_AUTH_MODE is "
            f"{os.environ['RAY_AUTH_MODE']}; unset it"
        )
    logging.getLogger("ray").setLevel(logging.ERROR)
    # It writes what raylets complain of, such as a killed worker, to standard output; that is handled and told here.
    ray._private.worker.listen_error_messages = lambda *_: None
    return ray


def room(nodes: Sequence[dict[str, Any]], gpus: float) -> int:
    """How many workers fit.

    Args:
        nodes: As Ray describes them.
        gpus: Of each worker.
    """
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    cpus = [int(have.get("CPU", 0)) for have in alive]
    if not gpus:
        return sum(cpus)
    return sum(min(count, int(have.get("GPU", 0)) * int(1 / gpus)) for count, have in zip(cpus, alive, strict=True))


def _check_connected(ray: Any, address: str | None) -> None:
    """Refuses an address that is not that of the cluster to which this process is connected: Ray knows one at a time."""
    connected = ray.get_runtime_context().gcs_address
    if address is not None and _resolved(address) != _resolved(connected):
        what = f"--ray-address must be {connected}, to which this process is connected"
        raise InputError(f"{what}; {address} came; leave it out, or call ray.shutdown() first")


def _resolved(address: str) -> tuple[str, str]:
    """Host and port, the host as a number where its name is known."""
    host, _, port = address.rpartition(":")
    with contextlib.suppress(OSError):
        return socket.gethostbyname(host.strip("[]")), port
    return host, port


def _connect(ray: Any, cluster: Cluster) -> None:
    given = {"address": cluster.address} if cluster.address else {**_OWN, "num_cpus": cluster.workers}
    try:
        if cluster.address:  # Ray itself tries for ten minutes
            host, _, port = cluster.address.rpartition(":")
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "1")
        ray.init(**given, log_to_driver=False, configure_logging=False, namespace="ppf")
    except (RuntimeError, ValueError, OSError, OverflowError, ray.exceptions.RayError) as error:
        where = f"a Ray cluster must answer at {cluster.address}" if cluster.address else "Ray must start on this machine"
        raise ResourceError(f"{where}; {first_line(error)}; see whether it runs") from error
