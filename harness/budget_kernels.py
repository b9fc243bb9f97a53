"""Part `kernels` of the budget: the machine code of every kernel for sm_80 and sm_90, by version of Triton.

What is compiled is `moc.kernels.budget.VARIANTS`. Triton keeps what it compiled by a hash of the source, so
only kernels that changed are compiled again; reading their machine code takes seconds.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import pkgutil

from harness.budget import Facts


def collect() -> Facts:
    """Registers, spills, shared bytes, instructions and tensor-core instructions; kernels left out."""
    from moc.kernels import budget

    version = importlib.metadata.version("triton").partition("+")[0]
    rows = budget.measure_all()
    facts: Facts = {
        f"kernels triton {version}": {
            f"{name}: {quantity}": value for name, row in rows.items() for quantity, value in row.items()
        }
    }
    missing = sorted(_kernels() - budget.compiled_kernels())
    facts["kernels"] = {"not compiled by the gate": " ".join(missing)}
    return facts


def _kernels() -> set[str]:
    """Names of everything in `moc` that can be launched; helpers that kernels call are not."""
    import triton

    import moc

    found = set()
    for info in pkgutil.walk_packages(moc.__path__, "moc."):
        module = importlib.import_module(info.name)
        found |= {
            name
            for name, value in vars(module).items()
            if isinstance(value, triton.JITFunction) and name.endswith("kernel")
        }
    return found


if __name__ == "__main__":
    print(json.dumps(collect()))
