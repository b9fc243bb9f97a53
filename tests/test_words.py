"""One name for one thing: words that docs/glossary.md replaces are in no module and no page."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A thing that is compared is a method; what judges it is the correctness check or the verdict.
REPLACED = re.compile(r"\b(rivals?|contenders?|referees?)\b", re.IGNORECASE)
# The name that definitions of benchmarks from before the change import.
KEPT = re.compile(r'"Contender"')


@pytest.mark.parametrize("folder", ["harness", "moc", "docs", "README.md", "Makefile"])
def test_no_text_uses_a_replaced_word(folder: str) -> None:
    """Code and pages name a compared thing a method."""
    root = ROOT / folder
    files = [path for path in root.rglob("*") if path.suffix in (".py", ".md")] if root.is_dir() else [root]
    assert files
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in files
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if REPLACED.search(KEPT.sub("", line))
    ]
    assert found == []
