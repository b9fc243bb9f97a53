"""Text generation of the whole model: all methods of a group on the same weights, in one process.

`batch` prompts of `seq_len` random tokens are read (the time to the first token), then each is continued by
`NEW_TOKENS` tokens, the likeliest ones. A sample is that whole loop: one decoding step, captured in a CUDA
graph by every method alike, replayed for each token; so its time is a mean over the places after the prompt,
and what a graph's launch costs per token is in it, as in serving. Weights are random: nothing here is about
what the model says. They exist once, whatever the number of methods; each method has its own cache.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from harness.measure import memory
from harness.measure.ffn import with_weights
from harness.measure.launch import FLUSH_FACTOR, TimedMethod, load_libraries
from harness.measure.stats import without_interval
from harness.measure.timing import PairedTimes
from harness.sweep.point import Point
from harness.sweep.support import model_config
from harness.workloads.generate_gate import Truth, check_decoding, find_truth
from harness.workloads.generate_model import ffn_tensors, model_on, random_weights
from harness.workloads.group import Bench, PlannedMethod, UnsupportedMethod, WrongMethod, frozen, open_group
from harness.workloads.job import Job
from harness.workloads.reporter import EventReporter
from moc.config import LlamaConfig
from moc.decoding import GreedyDecoder, cache_length

NEW_TOKENS = 32  # enough for the launch of the first graph to vanish; a longer loop says nothing new
_QUANTITIES = ("decode", "first")
_GATE_DRAWS = 4  # of the layer's gate: one on a few tokens sees little


@dataclass(frozen=True)
class _GenerateBench(Bench):
    """What all methods of the group are measured with."""

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

    def truth(self, planned: PlannedMethod) -> Truth:
        """The logits that a right implementation of the method's function has; computed once for all."""
        key = planned.method.reference, planned.selection
        if key not in self.truths:
            tokens, first = self.tokens[self.checked_rows()], self.prompt.shape[1] - 1
            self.truths[key] = find_truth(self.config, self.weights, tokens, first, *key)
        return self.truths[key]

    def checked_rows(self) -> Tensor:
        """Rows of the batch for which the truth is computed: the first two and the last."""
        rows = sorted({0, min(1, self.batch - 1), self.batch - 1})
        return torch.tensor(rows, device=self.tokens.device)


@dataclass(frozen=True)
class _ReadyMethod:
    """A method that passed both gates."""

    planned: PlannedMethod
    decoder: GreedyDecoder
    prompt: Tensor
    second: Tensor  # [batch, 1]: the token after the prompt, from which each loop starts

    def read_prompt(self) -> None:
        """Up to and with the choice of the first new token."""
        self.decoder.prefill(self.prompt)

    def rewind(self) -> None:
        """Back to where the prompt was just read."""
        self.decoder.rewind(self.prompt.shape[1], self.second)

    def timed(self, quantity: str) -> TimedMethod:
        """`decode`: the loop after the prompt; `first`: the prompt."""
        name, anchor = self.planned.name, self.planned.method.is_dense
        if quantity == "first":
            return TimedMethod(name, self.read_prompt, anchor=anchor)
        return TimedMethod(name, self.decoder.step, self.rewind, anchor=anchor, repeats=NEW_TOKENS)


def run(job: Job, report: EventReporter) -> None:
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
    bench = _GenerateBench(group, job.measure, report, config, weights, tokens, {})
    planned = group.plan(report)
    ready = bench.ready_methods(planned, lambda method: _prepare(bench, method))
    bench.truths.clear()
    ready, times = bench.time_methods(ready, _QUANTITIES, _ReadyMethod.timed, group.rotated_mode)
    note = _cache_note(bench)
    times = {name: replace(found, notes=(*found.notes, *note)) for name, found in times.items()}
    for method in ready:
        report.start(method.planned.point)
        _report_method(bench, method, ready, times)


def _total(point: Point) -> int:
    return point.seq_len + NEW_TOKENS


def _prepare(bench: _GenerateBench, planned: PlannedMethod) -> _ReadyMethod:
    try:
        decoder = _checked_decoder(bench, planned)
    except ValueError as error:  # a layer that does not take what a model gives it
        raise UnsupportedMethod(str(error)) from error
    decoder.prefill(bench.prompt)
    ready = _ReadyMethod(planned, decoder, bench.prompt, decoder.token.clone())
    if bench.settings.memory:
        _report_memory(bench, ready)
    return ready


def _checked_decoder(bench: _GenerateBench, planned: PlannedMethod) -> GreedyDecoder:
    """A decoder of the whole model, whose layer passed the gate on as many tokens as a step and the prompts
    have, and which decodes what it should, as compiled and on the cache that is timed.

    Raises WrongMethod if it does not.
    """
    group, config, prompt = bench.group, bench.config, bench.prompt
    layer = group.make_layer(planned)
    draws = [(bench.batch, _GATE_DRAWS), (prompt.numel(), 1)]
    bench.check_layer(planned, layer, layer, draws, backward=False)
    ffns = [frozen(with_weights(layer, ffn_tensors(bench.weights, n))) for n in range(config.n_layers)]
    del layer
    model = model_on(config, bench.weights, ffns)
    compile_step = functools.partial(group.compiled, planned)
    decoder = GreedyDecoder(model, bench.batch, bench.tokens.shape[1], compile_step)

    def prompt_and_token() -> None:
        decoder.prefill(prompt)
        decoder.step()

    bench.report_compile_time(planned, prompt_and_token)
    if bench.settings.gate:
        _check_decoding(bench, planned, decoder)
    return decoder


def _check_decoding(bench: _GenerateBench, planned: PlannedMethod, decoder: GreedyDecoder) -> None:
    truth = functools.partial(bench.truth, planned)
    first = bench.prompt.shape[1] - 1
    found = check_decoding(decoder, bench.tokens, first, bench.checked_rows(), truth)
    error = without_interval(found.median_error, found.places, "median over tokens")
    bench.report.measure(planned.point, "logits_rel_err", error)
    if not found.ok:
        raise WrongMethod(found.detail)


def _report_memory(bench: _GenerateBench, ready: _ReadyMethod) -> None:
    """Peak of reading the prompts and two steps, with the weights and the method's own cache."""
    cache = ready.decoder.cache

    def work() -> None:
        ready.read_prompt()
        ready.decoder.step()
        ready.decoder.step()

    weights = sum(weight.nbytes for weight in bench.weights.values())
    cached = sum(tensor.nbytes for tensor in (*cache.keys, *cache.values))
    if bench.group.device.type == "cuda":
        metric, over = "peak_allocated_bytes", memory.peak_bytes(work).over_start_bytes
    else:
        metric, over = "peak_rss_over_start_bytes", memory.peak_rss_over_start_bytes(work)
    bench.report.measure(
        ready.planned.point,
        metric,
        without_interval(weights + cached + over, statistic="max"),
        detail=f"of which weights {weights} bytes, cache {cached} bytes",
    )


def _cache_note(bench: _GenerateBench) -> list[str]:
    """What to know of a model so small that the L2 keeps part of it from token to token."""
    if bench.group.device.type != "cuda":
        return []
    weights = sum(weight.nbytes for weight in bench.weights.values())
    cache = torch.cuda.get_device_properties(bench.group.device).L2_cache_size
    if weights >= FLUSH_FACTOR * cache:
        return []
    return [f"weights of {weights / 1e6:.0f} MB stay partly in an L2 of {cache / 1e6:.0f} MB"]


def _report_method(
    bench: _GenerateBench, ready: _ReadyMethod, others: list[_ReadyMethod], times: dict[str, PairedTimes]
) -> None:
    """All remaining rows of one method, and its point finished."""
    planned, decode = ready.planned, times["decode"]
    bench.report_time(planned, "latency_ms", decode)
    bench.report_time(planned, "time_to_first_token_ms", times["first"])
    bench.report_rate(planned, bench.batch, decode)
    bench.report_speedup(planned, others, decode)
    bench.finish(planned, decode)
