"""Serving: the live model, its limits, and what its controller aims at."""

import ipaddress
import math
from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg

from ppf.config.checks import DtypeName, check_choice, check_count, check_idle, check_words, optional
from ppf.errors import InputError
from ppf.space.budget import parse_size

TOKEN_LENGTH = 22
"""Characters of a token: 128 bits in base64."""


@dataclass(frozen=True)
class ServeConfig:
    """Serve the live model: policies, an API as OpenAI clients speak it, and a page with a slider for the ratio."""

    study: Annotated[Positional[str], arg(metavar="STUDY")]
    """The study folder."""
    host: str = "127.0.0.1"
    """Address to listen at; any but this machine's own loopback needs a token."""
    port: int = 8000
    """Port to listen at; 0 takes a free one."""
    token: Annotated[str | None, optional("TOKEN")] = None
    """What clients must send as Authorization: Bearer TOKEN; by default what PPF_TOKEN holds, or none is asked for."""
    model: Annotated[str | None, optional("MODEL")] = None
    """Where the dense model lies now; by default where it was when the study was fitted."""
    no_model: bool = False
    """Serve decisions alone; no model is loaded."""
    ratio: Annotated[float, arg(metavar="R")] = 0.0
    """Pruning ratio to start with."""
    nested: bool = False
    """Take nested policies, so that a ratio that rises in mid-generation always leaves the KV cache usable; a --target-memory
    always does."""
    target_latency_ms: Annotated[float | None, optional("MS")] = None
    """Let the ratio follow the load so that a token takes at most so long."""
    target_memory: Annotated[str | None, optional("SIZE")] = None
    """Let the ratio follow the load so that weights in use and KV caches take at most so much, such as 500MiB."""
    min_ratio: Annotated[float, arg(metavar="R")] = 0.0
    """The smallest ratio that the controller may choose."""
    max_ratio: Annotated[float | None, optional("R")] = None
    """The largest one; by default the largest that the agent was trained on."""
    max_tokens: int = 512
    """The most tokens that one request may ask for."""
    device: str = "auto"
    """As in fit."""
    dtype: DtypeName = "auto"
    """As in fit."""

    def __post_init__(self) -> None:
        check_count("--port", self.port, 0)
        check_count("--max-tokens", self.max_tokens, 1)
        check_choice("--dtype", self.dtype, DtypeName)
        check_words(host=self.host, token=self.token, model=self.model, target_memory=self.target_memory)
        if self.port > 65535:
            raise InputError(f"--port must be at most 65535; {self.port} came; 8000 is usual")
        for flag, ratio in (("--ratio", self.ratio), ("--min-ratio", self.min_ratio), ("--max-ratio", self.max_ratio)):
            if ratio is not None and not 0 <= ratio < 1:
                raise InputError(f"{flag} must lie in [0, 1); {ratio:g} came; 0.3 removes 30 % of the prunable parameters")
        if self.max_ratio is not None and self.max_ratio < self.min_ratio:
            raise InputError(f"--max-ratio must be at least --min-ratio; {self.max_ratio:g} and {self.min_ratio:g} came; swap them")
        if self.max_ratio is not None and self.ratio > self.max_ratio:
            raise InputError(f"--ratio must be at most --max-ratio; {self.ratio:g} and {self.max_ratio:g} came; change one of them")
        if 0 < self.ratio < self.min_ratio:
            raise InputError(
                f"--ratio must be at least --min-ratio; {self.ratio:g} and {self.min_ratio:g} came; change one of them"
            )
        if self.target_latency_ms is not None and not (math.isfinite(self.target_latency_ms) and self.target_latency_ms > 0):
            raise InputError(f"--target-latency-ms must be a positive number; {self.target_latency_ms:g} came; give milliseconds")
        if self.target_memory is not None:
            parse_size(self.target_memory)
        if self.no_model and self.controlled:
            raise InputError("a target must come with a live model; --no-model came too; leave one out")
        self._check_idle()
        if self.token is not None and (len(self.token) < TOKEN_LENGTH or not self.token.isascii() or not self.token.isprintable()):
            raise InputError(
                f"--token must be at least {TOKEN_LENGTH} printable ASCII characters; another came; draw one at random"
            )

    def _check_idle(self) -> None:
        """Refuses flags that would do nothing."""
        if self.no_model:
            check_idle(self, ("model", "ratio", "max_tokens", "device", "dtype"), "a live model; --no-model came too")
        if not self.controlled:
            check_idle(self, ("min_ratio", "max_ratio"), "a target for the controller; none came")

    @property
    def decides_nested(self) -> bool:
        """Whether policies are nested: without it two sizes together read more than either, and a goal of memory is passed."""
        return self.nested or self.target_memory is not None

    @property
    def controlled(self) -> bool:
        """Whether a controller chooses the ratio."""
        return self.target_latency_ms is not None or self.target_memory is not None


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
