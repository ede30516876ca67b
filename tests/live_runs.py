"""A live model of a study without a server, and requests that it answers."""

import asyncio
import time

from ppf.decide import Decider
from ppf.llm.generate import Sampling
from ppf.progress import Progress
from ppf.recipes.live import elastic_for
from ppf.server.job import Job
from ppf.server.live import Live

PROMPT = [5, 9, 40, 7]


def opened(study, ratio=0.0, nested=True):
    decider = Decider(study)
    elastic, tokenizer = elastic_for(decider, None, "cpu", "auto", Progress(quiet=True))
    return Live(decider, elastic, tokenizer, ratio, nested, timing_seconds=0.0)


def collect(live, *jobs, then=lambda piece: None, failing=False):
    """All pieces of jobs that run side by side, or, where some may fail, their failures; ``then`` sees each piece of the first."""

    async def one(job, see):
        found = []
        live.admit(job)
        async for piece in live.pieces(job):
            see(piece)
            found.append(piece)
        return found

    async def all_of_them():
        return await asyncio.gather(
            *(one(job, then if job is jobs[0] else lambda _: None) for job in jobs), return_exceptions=failing
        )

    return asyncio.run(all_of_them())


def greedy(count, **options):
    return Job(PROMPT, Sampling(count, temperature=0), **options)


def text(pieces):
    return "".join(piece.text for piece in pieces)


def slowed(live, monkeypatch, seconds=0.02):
    """Lets every token take a while."""
    at = live.elastic.at

    def slow(*view):
        time.sleep(seconds)
        return at(*view)

    monkeypatch.setattr(live.elastic, "at", slow)
