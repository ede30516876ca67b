"""Gives mkdocs the pages that docs_pages.py makes; mkdocs.yml names this file under `hooks`."""

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from docs_pages import pages


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds them to those that lie in docs/."""
    for name, content in pages().items():
        files.append(File.generated(config, name, content=content))
    return files
