"""What can go wrong, as types: each names the exit code of the command line and is also a builtin.

Every message is one line: what must hold, what came, what to do.
"""

MEND = "ppf repair STUDY keeps what is whole and says how to go on"
"""What to do where a file of a study is damaged, whichever it is."""


class PPFError(Exception):
    """Base of every error that ppf raises on purpose.

    Args:
        message: What must hold; what came; what to do. Control characters in it, such as a line break in a path, appear
            escaped.

    Attributes:
        exit_code: Exit status of the command line for this kind of error.
    """

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__("".join(char if char.isprintable() else repr(char)[1:-1] for char in message))


class InputError(PPFError, ValueError):
    """A value, an option or a text that cannot be used as it is."""

    exit_code = 2


class UnsupportedError(PPFError, NotImplementedError):
    """A model, a format or a combination that ppf does not handle."""

    exit_code = 3


class DamagedError(PPFError, ValueError):
    """A file that is incomplete, altered, or belongs to something else."""

    exit_code = 4


class NewerError(DamagedError):
    """A file of a newer ppf: whole, and not to be touched."""


class ResourceError(PPFError, OSError):
    """The surroundings fail: disk, memory, network, or an optional package that is not installed."""

    exit_code = 5


class InUseError(PPFError, OSError):
    """Another process holds what is asked for."""

    exit_code = 6
