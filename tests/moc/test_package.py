"""The package `moc` itself: its public names and what importing it loads."""

import subprocess
import sys

import pytest

import moc


def test_public_names_are_sorted_and_exist() -> None:
    """`moc.__all__` holds each name once, constants, classes, then functions, each sorted, all importable."""
    names = list(moc.__all__)
    assert names == sorted(set(names), key=lambda name: (not name.isupper(), not name[0].isupper(), name))
    assert all(getattr(moc, name) is not None for name in names)
    assert set(moc._MODULE_OF) == set(names) <= set(dir(moc))


def test_an_unknown_name_is_an_attribute_error() -> None:
    """A name that the package does not have is refused as by any module."""
    with pytest.raises(AttributeError, match="module 'moc' has no attribute 'no_such_name'"):
        _ = moc.no_such_name


@pytest.mark.parametrize("module", ["moc", "moc.config", "moc.dtypes", "moc.selection"])
def test_import_without_torch(module: str) -> None:
    """The package, shapes and selection rules load neither PyTorch nor anything of the harness."""
    code = f"import sys, {module}; print({{'torch', 'harness'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_library_does_not_know_the_harness() -> None:
    """Importing all that is public imports nothing of the harness."""
    code = "import sys; from moc import *; print([m for m in sys.modules if m.split('.')[0] == 'harness'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
