"""report: one HTML file about a study, which needs nothing else.

study folder ── facts.py: figures ── plots.py: plotly's JSON ── page.py: HTML ── sections.py: what comes after what
"""

from pathlib import Path

from ppf.artifact import write_bytes
from ppf.config import ReportConfig
from ppf.errors import MEND, DamagedError, InputError, PPFError
from ppf.report.facts import Facts, table_of
from ppf.report.sections import report_page
from ppf.study import read_whole


def write_report(config: ReportConfig) -> Path:
    """Writes the report of a study.

    Args:
        config: Which study, where to, and which benches to show.

    Returns:
        The file.

    Raises:
        InputError: No study, one that is not fitted, or a folder in the place of the file.
        DamagedError: An artefact or a bench that is not whole.
        ResourceError: plotly is not installed, or the file cannot be written.
    """
    out = Path(config.out)
    if out.is_dir():
        raise InputError(f"--out must be a file; the folder {out} came; name a file in it")
    tables = [table_of(path) for path in config.bench]
    try:
        page, _ = read_whole(Path(config.study), lambda: report_page(Facts(config.study), tables))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, PPFError):
            raise
        what = f"{config.study} must hold the whole record of a fit"
        raise DamagedError(f"{what}; {error!r} came; {MEND}") from error
    write_bytes(out, page.encode())
    return out
