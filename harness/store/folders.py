"""Where a sweep may write: its own folder under results/, and nowhere else.

A name cannot hold a separator (`harness.sweep.check`), but a link in place of the folder, or of a file in it,
would lead a write elsewhere.
"""

from __future__ import annotations

import os
from pathlib import Path

from harness.errors import UserError


def results_folder(results: Path, name: str) -> Path:
    """The folder of the sweep called `name`, which need not exist yet.

    `results` itself may be a link: the user chose it. Raises UserError if the folder, or anything in
    it, is a link.
    """
    folder = results / name
    if folder.parent != results or name in (".", ".."):
        raise UserError(f"{folder} lies outside {results}; a sweep's name is a folder right under it")
    if folder.is_symlink():
        raise UserError(f"{folder} is a link; remove it, a sweep writes only below {results}")
    refuse_links(folder)
    return folder


def refuse_links(folder: Path) -> None:
    """Raise UserError naming the first link found in `folder`; a folder that is not there has none."""
    for parent, folders, files in os.walk(folder):
        for name in sorted((*folders, *files)):
            path = os.path.join(parent, name)
            if os.path.islink(path):
                raise UserError(f"{path} is a link; remove it, a sweep writes only below its own folder")
