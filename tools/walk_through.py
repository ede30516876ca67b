"""Walks through every how-to in a fresh clone with a fresh environment, and writes what was typed and printed.

    python tools/walk_through.py                         # all of it, into docs/walkthrough.md: half an hour and more
    python tools/walk_through.py plan --study runs/demo    # some pages, in this checkout as it is, with a study

A command is typed as its page shows it, but for the names in ``INSTEAD``: a how-to speaks of your model, and the walk takes the
embedded one. An exit code that is not 0 ends the walk, and so does a command that takes too long; what was seen so far is then
in runs/walkthrough.md. Standard library alone: the walk makes the environment itself.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "walkthrough.md"
TIMES = ROOT / "benchmarks" / "results" / "walkthrough.json"
SO_FAR = ROOT / "runs" / "walkthrough.md"
PAGES = ("memory", "serve", "llama-cpp", "recover", "cluster", "plan", "family")
INSTEAD = {
    "wikitext2": "pydocs",
    "8GB": "6.5MB",
    "5B": "3.2M",
    "12GiB": "12MiB",
    "--align 64 --tp 2": "--align 64",
    "--tokens 2000000": "--tokens 32768",
    "recover smaller --text pydocs --full": "recover smaller --text pydocs --tokens 32768 --full",
    " --ray-address 10.0.0.1:6379": "",
    " --study my-study --text pydocs --engine ray": " --study on-ray --text pydocs --samples 60 --engine ray",
}
"""What a page says, and what the walk types."""
LEFT_OUT = {
    "'ppf[llamacpp]'": "compiles llama.cpp, which takes minutes; [Results](results.md#gguf-files-in-llamacpp) has what it measures",
    "--gpus-per-worker": "wants a GPU",
}
PATIENCE, GRACE = 2400, 30
"""Seconds that a command may take, and those that it has to end when it is told to."""
READY = re.compile(r"http://[\d.]+:\d+")
UNTOLD = re.compile(r"^(\[\d+/\d+\] (?!.*done in)|[\w ]+: \d+ of \d+, )|^WARNING: (Location|Skipping|Retrying)|^\[notice\]")
"""Steps on their way, and what pip says of the places that it looks into."""
MOST_LINES = 40
NOISE = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
source, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(source)
torch.manual_seed(0)
with torch.no_grad():
    for weight in model.parameters():
        weight += 0.01 * weight.std() * torch.randn_like(weight)
model.save_pretrained(out)
AutoTokenizer.from_pretrained(source).save_pretrained(out)
"""
MACHINE = "import json; from ppf.provenance import machine; print(json.dumps(machine()))"
PLAN = "layer,attn,ffn\n" + "".join(f"{layer},{0.2 * (layer % 2):g},0.{1 + layer % 4}\n" for layer in range(12))

HEAD = """# Every how-to, typed

Made by `tools/walk_through.py` at commit {commit}, in a fresh clone with an environment of its own, on {cores} cores of {cpu} at a
load of {load}. From `git clone` to the table of `make demo` it took {minutes:.1f} minutes, the installation of everything included.
`my-llama` is a copy of the embedded model, `my-fine-tune` the same with a little noise on its weights, `ratios.csv` a plan of
twelve layers. `ppf` is installed from the clone. Where a page says the left one, the right one was typed:

| page | typed |
|---|---|
{changed}

"""


def typed(page: str) -> list[str]:
    """The commands of a page as the walk types them; those that it leaves out as they are."""
    shown = "".join(re.findall(r"```console\n(.*?)```", page, re.DOTALL)).splitlines()
    lines = [line.partition("  #")[0].rstrip() for line in shown if line.strip()]
    return [line if left_out(line) else instead(line) for line in lines]


def left_out(line: str) -> str | None:
    """Why a command is not typed; None if it is."""
    return next((reason for part, reason in LEFT_OUT.items() if part in line), None)


def instead(line: str) -> str:
    """A command with the names that the walk has."""
    for before, after in INSTEAD.items():
        line = line.replace(before, after)
    return line


class Walk:
    """A checkout with its environment, a folder to work in, and what was seen.

    Args:
        checkout: Of the repository; its environment lies in ``.venv``.
        work: Where the commands are typed.
        installs: Whether extras are installed; else they have to be there.
    """

    def __init__(self, checkout: Path, work: Path, installs: bool = True) -> None:
        self.checkout, self.work, self.bin, self.installs = checkout, work, checkout / ".venv" / "bin", installs
        others = {
            name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV", "PPF_", "OMP_"))
        }
        self.environment = {**others, "PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}", "COLUMNS": "120"}
        self.said: list[str] = []
        self.seconds: list[tuple[str, float]] = []

    def furnish(self) -> None:
        """What the pages take for granted: models, and a plan."""
        self.work.mkdir(exist_ok=True)
        embedded = self.checkout / "src" / "ppf" / "models" / "ref-a"
        shutil.copytree(embedded, self.work / "my-llama")
        subprocess.run([self.bin / "python", "-c", NOISE, embedded, self.work / "my-fine-tune"], check=True, timeout=PATIENCE)
        (self.work / "ratios.csv").write_text(PLAN)

    @contextmanager
    def started(self, command: str, where: Path, output: int | IO[str]) -> Iterator[subprocess.Popen[str]]:
        """A command in a session of its own, of which nothing runs on when the block ends."""
        print(f"$ {command}", file=sys.stderr, flush=True)
        process = subprocess.Popen(
            shlex.split(command), cwd=where, env=self.environment, stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
        try:
            yield process
        finally:
            for sign in (signal.SIGTERM, signal.SIGKILL):
                with suppress(ProcessLookupError):  # nothing is left of it; a number is not given anew so soon
                    os.killpg(process.pid, sign)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=GRACE)
            if process.stdout is not None:
                process.stdout.close()

    def run(self, command: str, where: Path) -> None:
        """Runs a command to its end and keeps what it printed."""
        start = time.perf_counter()
        with self.started(command, where, subprocess.PIPE) as process:
            try:
                output, _ = process.communicate(timeout=PATIENCE)
            except subprocess.TimeoutExpired:
                sys.exit(f"{command}: not done after {PATIENCE} s")
        self.keep(command, output, time.perf_counter() - start)
        if process.returncode:
            sys.exit(f"{command}: exit code {process.returncode}\n{output}")

    def keep(self, command: str, output: str, seconds: float) -> None:
        """One command and its output, as they go into the page."""
        self.seconds.append((self.portable(command), round(seconds, 1)))
        self.said.append(f"```text\n$ {self.portable(command)}\n{self.shown(output)}\n({seconds:.0f} s)\n```\n")

    def portable(self, text: str) -> str:
        """The text without the places of this machine."""
        for place, name in ((self.work, "."), (self.checkout, "ppf"), (ROOT, "REPOSITORY")):
            text = text.replace(str(place), name)
        return text

    def shown(self, text: str) -> str:
        """Output as the page has it: steps without their counters, long ones in part."""
        lines = [line.split("\r")[-1].rstrip() for line in self.portable(text).splitlines()]
        lines = [line for line in lines if line and not UNTOLD.match(line)]
        if len(lines) > MOST_LINES:
            half = MOST_LINES // 2
            lines = [*lines[:half], f"... {len(lines) - 2 * half} lines ...", *lines[-half:]]
        return "\n".join(lines)

    def how_to(self, name: str) -> None:
        """Every command of one page, in its order."""
        page = (self.checkout / "docs" / "howto" / f"{name}.md").read_text(encoding="utf-8")
        self.said.append(f"## [{page.splitlines()[0].removeprefix('# ')}](howto/{name}.md)\n")
        for line in typed(page):
            if reason := left_out(line):
                self.said.append(f"Not typed here, for it {reason}:\n\n```text\n{line}\n```\n")
            elif line.startswith("pip "):
                if self.installs:
                    self.install(line)
            elif line.startswith("ppf serve"):
                self.serve(line)
            else:
                self.make_room(line)
                self.run(line, self.work)

    def install(self, line: str) -> None:
        """An extra, from the checkout."""
        (extra,) = re.findall(r"\[(\w+)\]", line)
        self.run(f"pip install --quiet --constraint constraints.txt --editable '.[{extra}]'", self.checkout)

    def make_room(self, line: str) -> None:
        """Removes what an earlier command wrote under the same name."""
        for made in re.findall(r"--(?:out|gguf) (\S+)", line):
            if (place := self.work / made).exists():
                shutil.rmtree(place) if place.is_dir() else place.unlink()
                self.said.append(f"```text\n$ rm -r {made}\n```\n")

    def serve(self, command: str) -> None:
        """Starts a server, asks it for a policy, and stops it as Ctrl-C does."""
        command = with_free_port(command)
        start, log = time.perf_counter(), self.work / "serve.log"
        with log.open("w") as file, self.started(command, self.work, file) as process:
            while not (ready := READY.search(log.read_text())):
                if process.poll() is not None or time.perf_counter() - start > PATIENCE:
                    sys.exit(f"{command}: not ready\n{log.read_text()}")
                time.sleep(0.1)
            url = f"{ready[0]}/api/policy?ratio=0.3"
            with urllib.request.urlopen(url, timeout=60) as answer:  # noqa: S310 - our own server
                policy = answer.read().decode()
            process.send_signal(signal.SIGINT)
            code = process.wait(timeout=GRACE)
        self.keep(
            command, f"{log.read_text()}\n$ curl '{url}'\n{policy[:300]} ...\n^C (exit code {code})", time.perf_counter() - start
        )


def with_free_port(command: str) -> str:
    """A command of the server, with any free port where another process has the one that it would take."""
    asked = re.search(r" --port (\d+)", command)
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", int(asked[1]) if asked else 8000)):
            return command
    return f"{command.replace(asked[0], '') if asked else command} --port 0"


def whole_walk(walk: Walk) -> dict[str, Any]:
    """From the clone to the last page; what goes into the file of times."""
    start = time.perf_counter()
    walk.said.append("## From the clone to the demo's table\n")
    walk.run(f"git clone --quiet {ROOT} {walk.checkout}", walk.checkout.parent)
    walk.run("make demo", walk.checkout)
    seconds = time.perf_counter() - start
    found = subprocess.run([walk.bin / "python", "-c", MACHINE], check=True, capture_output=True, text=True, timeout=GRACE)
    walk.furnish()
    for name in PAGES:
        walk.how_to(name)
    return {
        "command": "python tools/walk_through.py",
        "commit": head_of(walk.checkout),
        "machine": json.loads(found.stdout),
        "result": {"clone_to_table_seconds": round(seconds), "commands": walk.seconds},
    }


def head_of(checkout: Path) -> str:
    """The commit that is checked out."""
    return subprocess.run(["git", "rev-parse", "HEAD"], cwd=checkout, check=True, capture_output=True, text=True).stdout.strip()


def page_of(walk: Walk, record: dict[str, Any]) -> str:
    """docs/walkthrough.md."""
    changed = "\n".join(f"| `{said.strip()}` | `{ran.strip() or 'nothing'}` |" for said, ran in INSTEAD.items())
    machine, minutes = record["machine"], record["result"]["clone_to_table_seconds"] / 60
    here = {name: machine[name] for name in ("cores", "cpu", "load")}
    head = HEAD.format(commit=record["commit"][:8], minutes=minutes, changed=changed, **here)
    return head + "\n".join(walk.said)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pages", nargs="*", help=f"of {', '.join(PAGES)}; all of them, and into the page, if none is given")
    parser.add_argument("--study", type=Path, help="that the pages find as my-study")
    chosen = parser.parse_args()
    if set(chosen.pages) - set(PAGES) or bool(chosen.pages) != bool(chosen.study):
        parser.error(f"pages must be of {', '.join(PAGES)} and come with --study; or give neither")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started ends too
    with tempfile.TemporaryDirectory(prefix="ppf-walk-") as temporary:
        work = Path(temporary).resolve() / "work"
        walk = Walk(ROOT, work, installs=False) if chosen.pages else Walk(work.parent / "ppf", work)
        try:
            if chosen.pages:
                walk.furnish()
                shutil.copytree(chosen.study, work / "my-study")
                for name in chosen.pages:
                    walk.how_to(name)
                print("\n".join(walk.said))
            else:
                record = whole_walk(walk)
                TIMES.write_text(json.dumps(record, indent=1) + "\n")
                PAGE.write_text(page_of(walk, record))
        except BaseException:
            SO_FAR.parent.mkdir(exist_ok=True)
            SO_FAR.write_text("\n".join(walk.said))
            raise


if __name__ == "__main__":
    main()
