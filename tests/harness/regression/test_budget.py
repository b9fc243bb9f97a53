"""The exact gate: what it says, and that it sees a tensor, a spill and a compiled variant more.

The mutations are applied to a copy of the code, whose facts a process of its own collects as the gate does. A
part is cut down to what is mutated, which makes seconds of minutes.
"""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from harness.regression.budget import check as budget
from harness.regression.budget.check import (
    BUDGET,
    ENVIRONMENTS,
    ROOT,
    Deviation,
    Facts,
    Part,
    check,
    deviations,
    dump,
)

# What is replaced in a copy, by a regular expression, and by what.
MUTATIONS = {
    "moc/layers/dense.py": [
        # Both the exponential and the logarithm keep a tensor.
        (r"F\.silu\(F\.linear\(x, w_gate\)\) \*", "F.silu(F.linear(x, w_gate)).exp().log() *"),
    ],
    "moc/kernels/passes.py": [
        (
            r"EXPAND_TILING = Tiling\(num_warps=\d+, rows=\d+,",
            "EXPAND_TILING = Tiling(num_warps=1, rows=128,",
        ),
        (r"num_warps=tiling\.num_warps,(?=\s+\))", "num_warps=tiling.num_warps << n_tokens % 2,"),
        (r'(_SELECT_VALUES = \[.*)"K", ', r"\1"),
    ],
}
SECTION = f"kernels triton {importlib.metadata.version('triton').partition('+')[0]}"
COLLECT = {
    "methods": """
import json
from harness.regression.budget import methods as part
part.METHODS = {name: part.METHODS[name] for name in ("dense", "dense_gu")}
print(json.dumps(part.collect()))
""",
    "variants": """
import json
from harness.regression.budget import variants as part
part.METHODS = {"moc": part.METHODS["moc"]}
print(json.dumps(part.collect()))
""",
    "kernels": """
import json
from harness.regression.budget.kernels import VARIANTS, measure
variant = next(variant for variant in VARIANTS if variant.kind == "expand")
facts = {f"{variant.name(90)}: {what}": value for what, value in measure(variant, 90).items()}
print(json.dumps({"SECTION": facts}))
""".replace("SECTION", SECTION),
}


@pytest.fixture(scope="module")
def mutated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the code with every mutation in it."""
    copy = tmp_path_factory.mktemp("mutated")
    for package in ("moc", "harness"):
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name, changes in MUTATIONS.items():
        text = (copy / name).read_text()
        for old, new in changes:
            text, count = re.subn(old, new, text)
            assert count, f"{name} has no {old}"
        (copy / name).write_text(text)
    return copy


def deviating(part: str, root: Path) -> dict[str, Deviation]:
    """Where the facts that were collected of a part deviate from the committed budget, by what they say."""
    environment = {**os.environ, **ENVIRONMENTS[part], "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", COLLECT[part]]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: Facts = json.loads(done.stdout.splitlines()[-1])
    known = json.loads(BUDGET.read_text())
    return {d.what: d for d in deviations(known, found) if d.now is not None}


def test_a_tensor_more_is_seen(mutated: Path) -> None:
    """A method that saves one more tensor is named with what it saved and saves; the others stay silent."""
    found = deviating("methods", mutated)
    saved = found.pop("dense: saved bytes per token")
    assert saved.now > saved.was
    assert (saved.now - saved.was) % (2 * 384) == 0  # whole tensors of d_ffn channels in bf16
    assert saved.line().startswith("methods 1m bf16: dense: saved bytes per token: was 3328, is ")
    assert saved.line().endswith("%) (accept: make bench-update)")
    assert set(found) == {"dense: fewest bytes of a step of 65536 tokens"}


def test_a_spill_is_seen(mutated: Path) -> None:
    """A kernel that spills registers is named, and so are its instructions."""
    if SECTION not in json.loads(BUDGET.read_text()):
        pytest.skip(f"budget.json does not know {SECTION}")
    found = deviating("kernels", mutated)
    spilled = found["sm_90 expand any f5504 bf16: spill_bytes"]
    assert spilled.was == 0
    assert spilled.now > 0
    assert "sm_90 expand any f5504 bf16: instructions" in found


def test_a_compiled_variant_is_seen(mutated: Path) -> None:
    """A kernel that is compiled anew for other numbers of tokens, or of kept channels, is named."""
    found = deviating("variants", mutated)
    for kernel in ("select_fwd_kernel", "expand_bwd_kernel"):
        tokens = found[f"moc bf16: {kernel} over 7 numbers of tokens"]
        assert tokens.now == 2 * tokens.was
    channels = found["moc bf16: select_fwd_kernel over 4 K"]
    assert channels.now > channels.was
    assert "moc bf16: expand_bwd_kernel over 4 K" not in found


def facts() -> Facts:
    """Sections of two parts and a version."""
    return {
        "methods": {"b: saved": 10, "a: saved": 5, "a: rows": "x y"},
        "kernels triton 3.7.1": {"k: registers": 32},
    }


def test_deviations_are_named() -> None:
    """A line per fact says what, was, is and how to accept; other versions' sections are not looked at."""
    now = facts()
    now["methods"] = {"b: saved": 12, "a: rows": "x z", "c: saved": 1}
    lines = [deviation.line() for deviation in deviations({**facts(), "kernels triton 3.6.0": {"k": 1}}, now)]
    assert lines == [
        "methods: b: saved: was 10, is 12 (+20.0 %) (accept: make bench-update)",
        "methods: a: rows: was 'x y', is 'x z': -y +z (accept: make bench-update)",
        "methods: c: saved: new, is 1 (accept: make bench-update)",
        "methods: a: saved: gone, was 5 (accept: make bench-update)",
    ]


def test_the_file_is_one_fact_a_line_in_order() -> None:
    """Whatever order facts come in, the file is the same, so that its diff is the change."""
    text = dump(facts())
    assert (
        dump({name: dict(reversed(section.items())) for name, section in reversed(facts().items())}) == text
    )
    assert [line.strip() for line in text.splitlines() if ":" in line and "{" not in line] == [
        '"k: registers": 32',
        '"a: rows": "x y",',
        '"a: saved": 5,',
        '"b: saved": 10',
    ]
    assert json.loads(text) == facts()


def test_check_and_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Twenty checks of unchanged code exit with 0; a change with 3 until it is accepted."""
    found = facts()
    monkeypatch.setattr(budget, "BUDGET", tmp_path / "budget.json")
    monkeypatch.setattr(budget, "collect", lambda _parts: found)
    monkeypatch.delenv("CI", raising=False)
    assert check(list(Part), update=True) == 0
    assert {check(list(Part), update=False) for _ in range(20)} == {0}
    found["methods"]["a: saved"] = 6
    capsys.readouterr()
    assert check(list(Part), update=False) == 3
    assert capsys.readouterr().out.splitlines() == [
        "methods: a: saved: was 5, is 6 (+20.0 %) (accept: make bench-update)",
        "4 facts, 1 deviate from budget.json",
    ]
    assert check(list(Part), update=True) == 0
    assert check(list(Part), update=False) == 0


def test_a_version_that_is_not_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Machine code of another Triton is not judged on a developer's machine, and is a deviation in CI."""
    found = facts()
    monkeypatch.setattr(budget, "BUDGET", tmp_path / "budget.json")
    monkeypatch.setattr(budget, "collect", lambda _parts: found)
    monkeypatch.delenv("CI", raising=False)
    check(list(Part), update=True)
    found["kernels triton 3.8.0"] = {"k: registers": 64}
    del found["kernels triton 3.7.1"]
    assert check(list(Part), update=False) == 0
    assert (
        "not judged: kernels triton 3.8.0; budget.json knows kernels triton 3.7.1" in capsys.readouterr().out
    )
    monkeypatch.setenv("CI", "true")
    assert check(list(Part), update=False) == 3
    check(list(Part), update=True)
    assert check(list(Part), update=False) == 0
    assert set(json.loads((tmp_path / "budget.json").read_text())) == {*found, "kernels triton 3.7.1"}


def test_a_part_that_fails_is_not_silence(tmp_path: Path) -> None:
    """Code that cannot be imported fails the gate with the end of its traceback."""
    folder = tmp_path / "harness/regression/budget"
    folder.mkdir(parents=True)
    for package in (folder, folder.parent, folder.parents[1]):
        (package / "__init__.py").touch()
    (folder / "startup.py").write_text("raise ImportError('no such thing')")
    with pytest.raises(RuntimeError, match=r"budget.startup failed:\n(.|\n)*no such thing"):
        budget.collect(["startup"], tmp_path)


def test_the_committed_budget() -> None:
    """It spills nothing, starts without what is slow to import, and stands in the order it is written in."""
    known: dict[str, dict[str, Any]] = json.loads(BUDGET.read_text())
    spills = {
        value for facts in known.values() for name, value in facts.items() if name.endswith("spill_bytes")
    }
    assert spills == {0}
    startup = known["startup"]["mocbench --help: dependencies"]
    assert not set(startup.split()) & {"torch", "triton", "optuna", "pandas", "numpy"}
    assert BUDGET.read_text() == dump(known)
