"""Part `startup` of the budget: what `mocbench --help` imports. What is imported is what starting costs.

The number of all modules depends on the versions of the libraries, so it counts only where those of
constraints.txt are installed.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
import subprocess
import sys
import tomllib

from harness.measure.environment import installed_version
from harness.regression.budget.check import ROOT, Facts

_LIST_MODULES = """
import contextlib, io, json, sys
before = set(sys.modules)  # what the interpreter and the environment load by themselves
sys.argv = ["mocbench", "--help"]
from harness.cli import main
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    main()
modules = {name: sys.modules[name] for name in set(sys.modules) - before}
print(json.dumps({name: getattr(module, "__cached__", None) is not None for name, module in modules.items()}))
"""


def collect() -> Facts:
    """Own modules and own dependencies that are imported, and where the versions are the tested ones, all."""
    output = subprocess.run(
        [sys.executable, "-c", _LIST_MODULES], check=True, capture_output=True, text=True
    ).stdout
    modules: dict[str, bool] = json.loads(output)
    own = [name for name in modules if name.partition(".")[0] in ("harness", "moc")]
    packages = importlib.metadata.packages_distributions()
    tops = {name.partition(".")[0] for name in modules}
    distributions = {_plain(name) for top in tops for name in packages.get(top, ())}
    facts: Facts = {
        "startup": {
            "mocbench --help: modules of this project": len(own),
            "mocbench --help: dependencies": " ".join(sorted(distributions & _dependencies())),
        }
    }
    if all(installed_version(name) == version for name, version in _pins().items() if name in distributions):
        facts[f"startup python {'.'.join(platform.python_version_tuple()[:2])}"] = {
            "mocbench --help: modules": len(modules),
            "mocbench --help: modules with bytecode": sum(modules.values()),
        }
    return facts


def _dependencies() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return {_plain(re.split(r"[<>=;\[ ]", text)[0]) for text in project["dependencies"]}


def _pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if "==" in line)
    return {_plain(name): version for name, version in pairs}


def _plain(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")
