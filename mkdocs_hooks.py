"""What the site's build does itself: MkDocs calls `on_files`, mkdocstrings loads `Sections`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File, Files

NO_CLAIMS = "# Claims\n\nNo claim has been tried in this copy yet: `foveate verify` writes this page.\n"


def on_files(files: Files, config: Any) -> Files:
    """Add the catalog, and a page of claims where `foveate verify` has not written one."""
    from foveate.catalog import markdown  # here, because pages that don't need it are served without PyTorch

    made = {"catalog.md": markdown(Path(config.docs_dir, "claims"))}
    if files.get_file_from_path("claims.md") is None:
        made["claims.md"] = NO_CLAIMS
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    return files


class Sections(griffe.Extension):
    """`Fields:` of methods and tasks are griffe's `Attributes:`, and `Example:` is its `Examples:`."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            text = obj.docstring.value.replace("Fields:\n", "Attributes:\n")
            obj.docstring.value = text.replace("Example:\n", "Examples:\n")
