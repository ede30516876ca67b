"""Walks through every how-to in a fresh clone with a fresh environment, and writes what was typed and printed.

    python tools/walk_through.py

A command is typed as its page shows it, but for the names in `INSTEAD`: a how-to speaks of your model, and the walk takes the
embedded one. Any exit code but 0 ends the walk. Standard library alone: it makes the environment itself.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).parents[1]
OUT = ROOT / "docs" / "walkthrough.md"
PAGES = ("memory", "serve", "llama-cpp", "recover", "cluster", "plan", "family")
INSTEAD = {
    "wikitext2": "pydocs",
    "8GB": "6.5MB",
    "5B": "3.2M",
    "12GiB": "8MiB",
    "--tokens 2000000": "--tokens 65536",
    "recover smaller --text pydocs --full": "recover smaller --text pydocs --tokens 65536 --full",
    " --ray-address 10.0.0.1:6379": "",
    " --study my-study --text pydocs --engine ray": " --study on-ray --text pydocs --samples 60 --engine ray",
}
"""What a page says, and what the walk types."""
LEFT_OUT = {
    "'ppf[llamacpp]'": "compiles llama.cpp, which takes minutes; `docs/results.md` has what it then measures",
    "--gpus-per-worker": "wants a GPU",
}
READY, PATIENCE = re.compile(r"http://[\d.]+:\d+"), 300
PROGRESS = re.compile(r"^\[\d+/\d+\] (?!.*done in)")
MOST_LINES = 40
NOISE = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
source, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(source)
with torch.no_grad():
    for weight in model.parameters():
        weight += 0.01 * weight.std() * torch.randn_like(weight)
model.save_pretrained(out)
AutoTokenizer.from_pretrained(source).save_pretrained(out)
"""
PLAN = "layer,attn,ffn\n" + "".join(f"{layer},{0.2 * (layer % 2):g},0.{1 + layer % 4}\n" for layer in range(12))

HEAD = """# Every how-to, typed

Made by `tools/walk_through.py` at commit {commit}, in a fresh clone with an environment of its own, on two cores without a GPU.
`make demo` took {minutes:.1f} minutes, installation included. `my-llama` is a copy of the embedded model, `my-fine-tune` the same
with a little noise on its weights, `ratios.csv` a plan of twelve layers. Where a page says the left one, the right one was typed:

| page | typed |
|---|---|
{changed}

"""


class Walk:
    """A clone, its environment, a folder to work in, and what was seen.

    Args:
        temporary: Where all of it goes.
    """

    def __init__(self, temporary: Path) -> None:
        self.clone, self.work, self.home = temporary / "ppf", temporary / "work", temporary
        self.work.mkdir()
        bin_folder = self.clone / ".venv" / "bin"
        self.environment = {**os.environ, "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}", "COLUMNS": "120"}
        self.said: list[str] = []

    def shown(self, text: str) -> str:
        """Output as the page has it: steps without their counters, long ones in part, no path of this machine."""
        lines = [line.split("\r")[-1].rstrip() for line in text.replace(str(self.home), "~").splitlines()]
        lines = [line for line in lines if line and not PROGRESS.match(line)]
        if len(lines) > MOST_LINES:
            half = MOST_LINES // 2
            lines = [*lines[:half], f"... {len(lines) - 2 * half} lines ...", *lines[-half:]]
        return "\n".join(lines)

    def run(self, command: str, where: Path) -> float:
        """Runs a command and keeps what it printed; the seconds that it took."""
        print(f"$ {command}", flush=True)
        start = time.perf_counter()
        ended = subprocess.run(
            shlex.split(command), cwd=where, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        seconds = time.perf_counter() - start
        self.keep(command, ended.stdout, seconds)
        if ended.returncode:
            sys.exit(f"{command}: exit code {ended.returncode}\n{ended.stdout}")
        return seconds

    def keep(self, command: str, output: str, seconds: float) -> None:
        """One command and its output, as they go into the page."""
        self.said.append(f"```text\n$ {command}\n{self.shown(output)}\n({seconds:.0f} s)\n```\n")

    def serve(self, command: str) -> None:
        """Starts a server, asks it for a policy, and stops it as Ctrl-C does."""
        print(f"$ {command}", flush=True)
        start, log = time.perf_counter(), self.home / "serve.log"
        with log.open("w") as file:
            process = subprocess.Popen(
                shlex.split(command), cwd=self.work, env=self.environment, stdout=file, stderr=subprocess.STDOUT
            )
        while not (ready := READY.search(log.read_text())) and process.poll() is None and time.perf_counter() - start < PATIENCE:
            time.sleep(0.1)
        if ready is None:
            process.kill()
            sys.exit(f"{command}: not ready\n{log.read_text()}")
        url = f"{ready[0]}/api/policy?ratio=0.3"
        with urllib.request.urlopen(url, timeout=60) as answer:  # noqa: S310 - our own server
            policy = answer.read().decode()
        process.send_signal(signal.SIGINT)
        code = process.wait(timeout=60)
        output = f"{log.read_text()}\n$ curl '{url}'\n{policy[:300]} ...\n^C (exit code {code})"
        self.keep(command, output, time.perf_counter() - start)

    def how_to(self, name: str) -> None:
        """Every command of one page, in its order."""
        text = (self.clone / "docs" / "howto" / f"{name}.md").read_text(encoding="utf-8")
        self.said.append(f"## [{text.splitlines()[0].removeprefix('# ')}](howto/{name}.md)\n")
        shown = "".join(re.findall(r"```console\n(.*?)```", text, re.DOTALL)).splitlines()
        for line in (line.partition("  #")[0].rstrip() for line in shown if line.strip()):
            reasons = [reason for part, reason in LEFT_OUT.items() if part in line]
            if reasons:
                self.said.append(f"Not typed here, for it {reasons[0]}:\n\n```text\n{line}\n```\n")
                continue
            for before, after in INSTEAD.items():
                line = line.replace(before, after)
            self.type(line)

    def type(self, line: str) -> None:
        """One command of a page."""
        if line.startswith("pip "):
            extra = re.findall(r"\[(\w+)\]", line)[0]
            install = f"pip install --quiet --constraint constraints.txt --editable '.[{extra}]'"
            self.run(install, self.clone)
        elif line.startswith("ppf serve"):
            self.serve(line)
        else:
            for made in re.findall(r"--(?:out|gguf) (\S+)", line):
                if (place := self.work / made).exists():
                    shutil.rmtree(place) if place.is_dir() else place.unlink()
                    self.said.append(f"```text\n$ rm -r {made}\n```\n")
            self.run(line, self.work)


def main() -> None:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    with tempfile.TemporaryDirectory() as temporary:
        walk = Walk(Path(temporary))
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(walk.clone)], check=True)
        walk.said.append("## From the clone to the demo's table\n")
        seconds = walk.run("make demo", walk.clone)
        embedded = walk.clone / "src" / "ppf" / "models" / "ref-a"
        shutil.copytree(embedded, walk.work / "my-llama")
        subprocess.run([walk.clone / ".venv" / "bin" / "python", "-c", NOISE, embedded, walk.work / "my-fine-tune"], check=True)
        (walk.work / "ratios.csv").write_text(PLAN)
        for name in PAGES:
            walk.how_to(name)
    changed = "\n".join(f"| `{said.strip()}` | `{ran.strip() or 'nothing'}` |" for said, ran in INSTEAD.items())
    OUT.write_text(HEAD.format(commit=commit.strip(), minutes=seconds / 60, changed=changed) + "\n".join(walk.said))
    print(f"{OUT.relative_to(ROOT)} written")


if __name__ == "__main__":
    main()
