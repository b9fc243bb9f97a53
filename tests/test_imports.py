"""Which folder may import which: the rules of docs/architecture.md, read from every import of the tree."""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("harness", "moc")
REST = ("measure", "workloads", "training", "run", "search", "report", "forecast", "regression")
# Modules below the first name import nothing below any of the others, anywhere in their files.
NEVER: dict[str, tuple[str, ...]] = {
    "moc": ("harness",),
    "harness.sweep": tuple(f"harness.{name}" for name in ("store", "dashboard", "doctor", "cli", *REST)),
    "harness.store": tuple(f"harness.{name}" for name in ("measure", "workloads", "run", "search", "report")),
    "harness.measure": tuple(f"harness.{name}" for name in ("sweep", "store", "run", "search", "report")),
    "harness.training": tuple(f"harness.{name}" for name in ("store", "run", "search", "report")),
    "harness.workloads": tuple(f"harness.{name}" for name in ("store", "run", "search", "report")),
    "harness.run": tuple(f"harness.{name}" for name in ("report", "forecast", "regression")),
    "harness.report": ("harness.run",),
}
# A library, and the only modules that import it.
ONLY: dict[str, tuple[str, ...]] = {
    "optuna": ("harness.search", "harness.dashboard"),
    "optuna_dashboard": ("harness.search", "harness.dashboard"),
    "matplotlib": ("harness.report.plots",),
    "seaborn": ("harness.report.plots",),
    "harness.cli": ("harness.__main__", "harness.regression.budget.startup"),
    "harness.soak": ("harness.soak",),
    "harness.tuning": ("harness.tuning",),
}


def modules(root: Path) -> dict[str, Path]:
    """Every module of the two packages by its dotted name."""
    found = {}
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """What a file imports, at its top or inside a function; a module after `import` counts as itself."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            for alias in node.names:
                module = f"{node.module}.{alias.name}"
                yield module if module in known else str(node.module)


def graph(root: Path) -> dict[str, set[str]]:
    """What each module imports."""
    known = modules(root)
    return {name: set(imports(path, known)) for name, path in known.items()}


def below(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def broken_rules(edges: dict[str, set[str]]) -> list[str]:
    """Every import that must not exist, as `importer imports module`."""
    found = []
    for importer, imported in edges.items():
        for module in sorted(imported):
            never = any(
                below(importer, owner) and any(below(module, other) for other in others)
                for owner, others in NEVER.items()
            )
            elsewhere = any(
                below(module, library) and not any(below(importer, owner) for owner in owners)
                for library, owners in ONLY.items()
            )
            if never or elsewhere:
                found.append(f"{importer} imports {module}")
    return found


def circle(edges: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle; empty if there is none."""
    own = {name: {module for module in imported if module in edges} for name, imported in edges.items()}
    try:
        graphlib.TopologicalSorter(own).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def test_no_import_breaks_a_rule() -> None:
    """Folders import only what docs/architecture.md allows."""
    edges = graph(ROOT)
    assert len(edges) > 100
    assert broken_rules(edges) == []


def test_no_modules_import_each_other() -> None:
    """The imports of the tree, those inside functions included, have no circle."""
    assert circle(graph(ROOT)) == []


@pytest.mark.parametrize(
    ("path", "line", "broken"),
    [
        (
            "harness/sweep/point.py",
            "import harness.store.rows",
            "harness.sweep.point imports harness.store.rows",
        ),
        ("moc/ops/a.py", "from harness import errors", "moc.ops.a imports harness.errors"),
        ("harness/run/a.py", "def f():\n    import optuna.trial", "harness.run.a imports optuna.trial"),
    ],
    ids=["upward", "package", "library"],
)
def test_a_forbidden_import_is_found(tmp_path: Path, path: str, line: str, broken: str) -> None:
    """An import against the rules is named, also inside a function."""
    for name in (path, "harness/store/rows.py", "harness/errors.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / path).write_text(line)
    assert broken_rules(graph(tmp_path)) == [broken]


def test_a_circle_is_found(tmp_path: Path) -> None:
    """Two modules that import each other are named."""
    (tmp_path / "harness").mkdir()
    (tmp_path / "harness/a.py").write_text("from harness import b")
    (tmp_path / "harness/b.py").write_text("def f():\n    from harness.a import g")
    assert set(circle(graph(tmp_path))) == {"harness.a", "harness.b"}


@pytest.mark.parametrize("package", PACKAGES)
def test_no_folder_is_crowded(package: str) -> None:
    """A folder holds at most fifteen modules beside its `__init__` and `__main__`."""
    folders = {path.parent for path in modules(ROOT).values() if path.is_relative_to(ROOT / package)}
    counts = {
        folder: len([path for path in folder.glob("*.py") if path.stem not in ("__init__", "__main__")])
        for folder in folders
    }
    assert all(count <= 15 for count in counts.values()), counts
