"""The command line: flags come from the config dataclasses, answers go to standard output, all else to standard error.

Exit codes: 0 done, 2 input, 3 unsupported, 4 damaged, 5 environment, 6 in use, 130 stopped by Ctrl-C, 143 by SIGTERM.
"""

import contextlib
import io
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Union

import tyro
from tyro.conf import FlagCreatePairsOff, OmitSubcommandPrefixes, subcommand

from ppf.commands import COMMANDS, check_places
from ppf.config import ModelsConfig, PolicyConfig, RepairConfig, ReportConfig, ServeConfig
from ppf.errors import InputError, PPFError

_Command: Any = Union[tuple(Annotated[config, subcommand(name)] for name, (config, _) in COMMANDS.items())]  # noqa: UP007
_LIGHT = ModelsConfig | PolicyConfig | RepairConfig | ReportConfig | ServeConfig
"""What runs without transformers, or brings it where it is needed."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: Without the program's name; by default those of the process.

    Returns:
        The exit code.
    """
    # Threads that wait in a busy loop make two of them far slower than one on cores that others use too.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug, keeps = "--debug" in given, given[:1] in (["fit"], ["bench"], ["demo"])
    try:
        command = _parse([argument for argument in given if argument != "--debug"])
        if command is not None:
            _run(command, debug)
        return 0
    except PPFError as error:
        return _fail(str(error), error.exit_code, debug)
    except KeyboardInterrupt as stop:
        what = str(stop) or ("what was measured is kept, and the same command goes on" if keeps else "nothing was written")
        return _fail(f"stopped; {what}", 143 if isinstance(stop, _Terminated) else 130, debug)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return _fail(f"a file or folder must be usable; {error}; check its name and its permissions", 5, debug)
    except (MemoryError, RuntimeError) as error:
        from ppf.llm.perplexity import is_memory

        if not is_memory(error):
            raise
        return _fail("there must be enough memory; there was not; take a smaller --seq-len or --dtype bfloat16", 5, debug)


def _run(command: Any, debug: bool) -> None:
    check_places(command)
    if not isinstance(command, _LIGHT) and not debug:
        from ppf.llm.load import quiet_transformers

        quiet_transformers()
    with contextlib.nullcontext() if isinstance(command, ServeConfig) else _terminable():  # a server has its own way to end
        next(run for config, run in COMMANDS.values() if isinstance(command, config))(command)


class _Terminated(KeyboardInterrupt):
    """SIGTERM came, as schedulers and containers send it."""


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Ends as Ctrl-C does where SIGTERM comes; outside the main thread, where no signal arrives, nothing changes."""

    def stop(*_: object) -> None:
        raise _Terminated

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _fail(message: str, code: int, debug: bool) -> int:
    if debug:
        import traceback

        traceback.print_exc()
    print(f"error: {message}", file=sys.stderr)
    return code


def _parse(arguments: list[str]) -> Any:
    """The config of the command; None if help or version was printed.

    Raises:
        InputError: Flags that do not exist or do not fit.
    """
    if arguments in (["--version"], ["-V"]):
        import ppf

        print(f"ppf {ppf.__version__}")
        return None
    if not arguments:
        arguments = ["--help"]
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            config = (FlagCreatePairsOff, OmitSubcommandPrefixes)
            return tyro.cli(_Command, prog="ppf", description=_description(), args=arguments, config=config)
    except SystemExit as stop:
        if not stop.code:
            return None
        raise InputError(_one_line(complaint.getvalue(), arguments)) from None


def _description() -> str:
    return "Make a language model smaller, by any ratio; the result loads in transformers. Add --debug for tracebacks."


def _one_line(box: str, arguments: list[str]) -> str:
    """tyro's framed message in one line."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", box)
    words = " ".join(re.sub(r"[╭╮╰╯─│|]+|-{3,}", " ", plain).split())
    for frame in ("Parsing error", "Required options", "Unrecognized options", "Value error", "Invalid input"):
        words = words.removeprefix(f"{frame} ")
    words = re.split(r" For full helptext| Argument helptext| Available subcommands| Perhaps you meant", words)[0].rstrip(". ")
    if own := re.match(r"Error parsing \w*(?:Config|Target): (.*)", words):
        return own[1]
    if number := re.match(r"Error parsing (--[\w-]+): .*from \['?(.*?)'?\]", words):
        words = f"{number[1]} does not take {number[2]!r}"
    command = f" {arguments[0]}" if arguments[0] in COMMANDS else ""
    return f"the command line must be one that ppf knows; {words}; see ppf{command} --help"
