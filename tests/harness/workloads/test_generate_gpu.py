"""What only a GPU can show of `generate`: that every method's step is captured in a graph, and is right."""

import pytest
import torch
from recorder import Recorder, point

from harness.sweep.model import Measure, Timing
from harness.workloads import generate
from harness.workloads.job import Job

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("batch", [1, 4])
def test_every_method_decodes_in_a_graph(batch: int) -> None:
    """Dense, compiled dense and MoC pass the gate, and all are timed as graphs: none waits for the device."""
    shape = {"d_model": 512, "d_ffn": 1408, "n_layers": 4, "n_heads": 8, "vocab_size": 4096}
    values = {"workload": "generate", "batch": batch, "seq_len": 48, "dtype": "bf16", **shape}
    points = [
        point("dense", **values),
        point("dense_compiled", **values),
        *(point("moc", rule, **values) for rule in ("topk:0.1875", "nm:2:8", "nm:12:64")),
        point("moc_reference", "topk:0.1875", **values),
    ]
    recorder = Recorder()
    settings = Measure(timing=Timing(rel_ci=0.05, max_seconds=5.0))
    generate.run(Job("s", "r", 1, tuple(points), settings, "cuda", "."), recorder)
    for name, (status, detail) in recorder.finished.items():
        assert status == "ok", (name, status, detail)
        assert "eagerly" not in detail
        for metric in ("latency_ms", "time_to_first_token_ms"):
            assert recorder.rows[name][metric]["timing_mode"] == "graph_rotated", name
        assert recorder.rows[name]["logits_rel_err"]["value"] < 0.1
    assert len(recorder.finished) == len(points)


def test_weights_are_on_the_device_once() -> None:
    """With three methods the peak is that of one set of weights and caches, not of three sets."""
    shape = {"d_model": 1024, "d_ffn": 2816, "n_layers": 8, "n_heads": 16, "vocab_size": 32000}
    values = {"workload": "generate", "batch": 1, "seq_len": 64, "dtype": "bf16", **shape}
    names = [("dense", None), ("dense_gu", None), ("moc_reference", "nm:2:8")]
    recorder = Recorder()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    sizes: list[int] = []
    prepare = generate._prepare

    def watched(*arguments: object) -> object:
        found = prepare(*arguments)
        sizes.append(torch.cuda.memory_allocated() - before)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "_prepare", watched)
        settings = Measure(timing=Timing(rel_ci=0.99, max_seconds=1.0), gate=False, memory=False)
        points = tuple(point(method, rule, **values) for method, rule in names)
        generate.run(Job("s", "r", 1, points, settings, "cuda", "."), recorder)
    weights = 2 * (2 * 32000 * 1024 + 8 * (4 * 1024**2 + 3 * 1024 * 2816))
    assert len(sizes) == len(names)
    assert sizes[-1] < 1.2 * weights
