"""Text generation of the whole model: all methods of a group on the same weights, in one process.

`batch` prompts of `seq_len` random tokens are read (the time to the first token), then each is continued by
`NEW_TOKENS` tokens, the likeliest ones. A sample is that whole loop: one decoding step, captured in a CUDA
graph by every method alike, replayed for each token; so its time is a mean over the places after the prompt,
and what a graph's launch costs per token is in it, as in serving. Weights are random: nothing here is about
what the model says. They exist once, whatever the number of methods; each method has its own cache.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from harness.measure import gate, memory, stats
from harness.measure.ffn import ffn_weights
from harness.measure.launch import FLUSH_FACTOR, Contender, first_call_seconds, load_libraries
from harness.measure.timing import PairedTimes, time_paired
from harness.sweep.model import Measure
from harness.sweep.point import Point
from harness.sweep.support import model_config
from harness.workloads.generate_gate import Truth, check_decoding, find_truth
from harness.workloads.generate_model import ffn_tensors, model_on, random_weights
from harness.workloads.group import (
    Entry,
    Group,
    compiled,
    finish_timed,
    frozen,
    join_notes,
    open_entry,
    open_group,
    release_memory,
    report_estimate,
    report_speedup,
    time_all,
    timing_settings,
    with_weights,
)
from harness.workloads.job import Job, Reporter
from moc.config import LlamaConfig
from moc.decoding import GreedyDecoder, cache_length

NEW_TOKENS = 32  # enough for the launch of the first graph to vanish; a longer loop says nothing new
_QUANTITIES = ("decode", "first")
_GATE_DRAWS = 4  # of the layer's gate: one on a few tokens sees little
_MODES = {"auto": "graph_rotated", "graph_cold": "graph_rotated", "launch_cold": "launch_rotated"}


@dataclass(frozen=True)
class _Bench:
    """What all methods of the group are measured with."""

    group: Group
    settings: Measure
    report: Reporter
    config: LlamaConfig
    weights: dict[str, Tensor]
    tokens: Tensor  # [batch, seq_len + NEW_TOKENS]: the prompts, and what the gate continues them by
    truths: dict[object, Truth]  # by reference and selection

    @property
    def batch(self) -> int:
        return self.tokens.shape[0]

    @property
    def prompt(self) -> Tensor:
        return self.tokens[:, : self.tokens.shape[1] - NEW_TOKENS]

    def truth(self, entry: Entry) -> Truth:
        """The logits that a right implementation of the entry's function has; computed once for all."""
        key = entry.method.reference, entry.selection
        if key not in self.truths:
            tokens, first = self.tokens[self.checked_rows()], self.prompt.shape[1] - 1
            self.truths[key] = find_truth(self.config, self.weights, tokens, first, *key)
        return self.truths[key]

    def checked_rows(self) -> Tensor:
        """Rows of the batch for which the truth is computed: the first two and the last."""
        rows = sorted({0, min(1, self.batch - 1), self.batch - 1})
        return torch.tensor(rows, device=self.tokens.device)


@dataclass(frozen=True)
class _Candidate:
    """An entry that passed the gate, ready to run."""

    entry: Entry
    decoder: GreedyDecoder
    prompt: Tensor
    second: Tensor  # [batch, 1]: the token after the prompt, from which each loop starts

    def read_prompt(self) -> None:
        """Up to and with the choice of the first new token."""
        self.decoder.prefill(self.prompt)

    def rewind(self) -> None:
        """Back to where the prompt was just read."""
        self.decoder.rewind(self.prompt.shape[1], self.second)

    def contender(self, quantity: str) -> Contender:
        """`decode`: the loop after the prompt; `first`: the prompt."""
        name, anchor = self.entry.name, self.entry.method.is_dense
        if quantity == "first":
            return Contender(name, self.read_prompt, anchor=anchor)
        return Contender(name, self.decoder.step, self.rewind, anchor=anchor, repeats=NEW_TOKENS)


def run(job: Job, report: Reporter) -> None:
    """Measure the points of a group; see the module. Raises as `harness.workloads.ffn_train.run` does, and
    ValueError naming a field that a `generate` point lacks."""
    group = open_group(job)
    load_libraries(group.device, group.dtype)
    report.start(group.points[0])
    config = model_config(group.points[0]).with_(max_seq_len=cache_length(_total(group.points[0])))
    weights = random_weights(config, group.dtype, group.device, group.seed)
    generator = torch.Generator(group.device).manual_seed(group.seed)
    size = (group.points[0].batch, _total(group.points[0]))
    tokens = torch.randint(config.vocab_size, size, generator=generator, device=group.device)
    bench = _Bench(group, job.measure, report, config, weights, tokens, {})
    candidates = []
    for number, point in enumerate(group.points):
        report.start(point)
        report.progress(point, 0.5 * number / len(group.points), "checking")
        candidate = _admit(bench, point)
        if candidate is not None:
            candidates.append(candidate)
    bench.truths.clear()
    candidates, times = time_all(
        group, report, candidates, _QUANTITIES, lambda left, quantity: _time_one(bench, left, quantity)
    )
    for candidate in candidates:
        report.start(candidate.entry.point)
        _report_candidate(bench, candidate, candidates, times)


def _total(point: Point) -> int:
    return point.seq_len + NEW_TOKENS


def _admit(bench: _Bench, point: Point) -> _Candidate | None:
    """The point ready to be timed; None after it was finished as unsupported, out of memory or wrong."""
    group, report = bench.group, bench.report
    entry = open_entry(group, point, report, train=False)
    if entry is None:
        return None
    try:
        candidate, seconds = _prepare(bench, entry)
    except ValueError as error:
        report.finish(point, "unsupported", f"method {entry.method.name}: {error}")
        return None
    except (RuntimeError, MemoryError) as error:
        if not memory.is_out_of_memory(error):
            raise
        report.finish(point, "oom", str(error).partition("\n")[0])
        return None
    finally:
        release_memory(group)
    if candidate is None:
        return None
    report.measure(point, "compile_s", seconds, n_samples=1, statistic="first_minus_steady")
    if bench.settings.memory:
        _report_memory(bench, candidate)
    return candidate


def _prepare(bench: _Bench, entry: Entry) -> tuple[_Candidate | None, float]:
    """The candidate and what its compilation took; no candidate after it was finished as wrong."""
    group, config = bench.group, bench.config
    layer = entry.method.make(config.ffn, entry.selection).to(group.device, group.dtype)
    ffn_weights(layer, config.ffn)  # raises for what is no SwiGLU
    if bench.settings.gate and not _layer_is_right(bench, entry, layer):
        return None, 0.0
    ffns = [
        frozen(with_weights(layer, ffn_tensors(bench.weights, number))) for number in range(config.n_layers)
    ]
    del layer
    decoder = GreedyDecoder(
        model_on(config, bench.weights, ffns),
        bench.batch,
        bench.tokens.shape[1],
        functools.partial(compiled, group, entry),
    )

    def prompt_and_token() -> None:
        decoder.prefill(bench.prompt)
        decoder.step()

    first, steady = first_call_seconds(Contender(entry.name, prompt_and_token), group.device)
    if bench.settings.gate and not _decoding_is_right(bench, entry, decoder):
        return None, 0.0
    decoder.prefill(bench.prompt)
    return _Candidate(entry, decoder, bench.prompt, decoder.token.clone()), max(0.0, first - steady)


def _layer_is_right(bench: _Bench, entry: Entry, layer: torch.nn.Module) -> bool:
    """Whether the bare layer passes the gate on as many tokens as a step and as the prompts have."""
    worst, count, details = 0.0, 0, []
    for tokens, draws in ((bench.batch, _GATE_DRAWS), (bench.prompt.numel(), 1)):
        found = gate.check(
            layer,
            ffn_weights(layer, bench.config.ffn),
            entry.method.reference,
            entry.selection,
            tokens,
            bench.group.seed + 1,
            backward=False,
            draws=draws,
        )
        worst, count = max(worst, found.max_rel_err), count + draws * len(found.errors)
        if not found.ok:
            details.append(f"with {tokens} tokens {found.detail}")
    bench.report.measure(entry.point, "max_rel_err", worst, n_samples=count, statistic="max")
    if details:
        bench.report.finish(entry.point, "wrong", "; ".join(details))
    return not details


def _decoding_is_right(bench: _Bench, entry: Entry, decoder: GreedyDecoder) -> bool:
    """Whether the whole model decodes what it should, as compiled and on the cache that is timed."""
    found = check_decoding(
        decoder,
        bench.tokens,
        bench.prompt.shape[1] - 1,
        bench.checked_rows(),
        functools.partial(bench.truth, entry),
    )
    bench.report.measure(
        entry.point,
        "logits_rel_err",
        found.median_error,
        n_samples=found.places,
        statistic="median over tokens",
    )
    if not found.ok:
        bench.report.finish(entry.point, "wrong", found.detail)
    return found.ok


def _report_memory(bench: _Bench, candidate: _Candidate) -> None:
    """Peak of reading the prompts and two steps, with the weights and the method's own cache."""
    cache = candidate.decoder.cache

    def work() -> None:
        candidate.read_prompt()
        candidate.decoder.step()
        candidate.decoder.step()

    weights = sum(weight.nbytes for weight in bench.weights.values())
    cached = sum(tensor.nbytes for tensor in (*cache.keys, *cache.values))
    if bench.group.device.type == "cuda":
        metric, over = "peak_allocated_bytes", memory.peak_bytes(work).over_start_bytes
    else:
        metric, over = "peak_rss_over_start_bytes", memory.peak_rss_over_start_bytes(work)
    bench.report.measure(
        candidate.entry.point,
        metric,
        float(weights + cached + over),
        n_samples=1,
        statistic="max",
        detail=f"of which weights {weights} bytes, cache {cached} bytes",
    )


def _time_one(bench: _Bench, candidates: Sequence[_Candidate], quantity: str) -> PairedTimes:
    group = bench.group
    points = {candidate.entry.name: candidate.entry.point for candidate in candidates}

    def on_start(name: str) -> None:
        bench.report.start(points[name])
        bench.report.progress(points[name], {"decode": 0.6, "first": 0.8}[quantity], f"timing {quantity}")

    times = time_paired(
        [candidate.contender(quantity) for candidate in candidates],
        timing_settings(group, bench.settings),
        group.device,
        _MODES.get(group.timing_mode, group.timing_mode),
        on_start,
    )
    release_memory(group)
    return replace(times, notes=(*times.notes, *_cache_note(bench)))


def _cache_note(bench: _Bench) -> list[str]:
    """What to know of a model so small that the L2 keeps part of it from token to token."""
    if bench.group.device.type != "cuda":
        return []
    weights = sum(weight.nbytes for weight in bench.weights.values())
    cache = torch.cuda.get_device_properties(bench.group.device).L2_cache_size
    if weights >= FLUSH_FACTOR * cache:
        return []
    return [f"weights of {weights / 1e6:.0f} MB stay partly in an L2 of {cache / 1e6:.0f} MB"]


def _report_candidate(
    bench: _Bench,
    candidate: _Candidate,
    candidates: Sequence[_Candidate],
    times: dict[str, PairedTimes],
) -> None:
    """All remaining rows of one candidate, and its point finished."""
    group, report, entry = bench.group, bench.report, candidate.entry
    for quantity, metric in (("decode", "latency_ms"), ("first", "time_to_first_token_ms")):
        samples = times[quantity].samples[entry.name]
        unsettled = times[quantity].unsettled(entry.name, timing_settings(group, bench.settings))
        report_estimate(
            report,
            entry.point,
            metric,
            stats.median_estimate(samples, group.seed),
            times[quantity],
            status="unstable" if unsettled else "ok",
            detail=join_notes(unsettled, *times[quantity].notes),
        )
        report.samples(entry.point, metric, samples.tolist())
    decode = times["decode"]
    step = stats.median_estimate(decode.samples[entry.name], group.seed)
    report_estimate(report, entry.point, "tokens_per_s", stats.rate(bench.batch * 1e3, step), decode)
    report_speedup(group, report, entry, [other.entry for other in candidates], decode)
    finish_timed(group, bench.settings, report, entry, decode)
