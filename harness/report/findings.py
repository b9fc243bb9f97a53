"""Sentences that say what the numbers mean, and nothing that the numbers do not support.

Every claim names what it is compared with, and states every limitation that applies: how many seeds, how
many tokens per parameter, whether a ratio is paired, whether the device is a CPU.
"""

from __future__ import annotations

import math

import pandas as pd

from harness.measure.environment import CPU_PREFIX
from harness.report import wording
from harness.report.summary import SEEDS_FOR_INTERVAL, failures, gaps_hold_zero, lead_lines
from harness.report.tables import Tables
from harness.sweep.catalog import WORKLOADS

# Below this a training run is too short to rank methods by quality (about 20 is compute-optimal).
SHORT_RUN_TOKENS_PER_PARAMETER = 20
# A ratio whose interval is wider than this either way was measured while something else was running.
NOISY_RATIO = 0.1


def findings(tables: Tables) -> list[str]:
    """What the tables of one device show, one sentence or two per item.

    Misaligned shapes and failed points support no sentence except the one that counts them. Empty tables
    give an empty list.
    """
    points, summary = tables.points, tables.summary
    sentences: list[str] = []
    for workload in dict.fromkeys(summary["workload"]):
        part = summary[summary["workload"] == workload]
        lead = lead_lines(part)
        compared = lead[lead["baseline"] != ""]
        if compared.empty:
            sentences.append(_nothing_to_compare(workload, part))
            continue
        sentences += [speed_sentence(compared, part), memory_sentence(compared)]
        if workload == "pretrain":
            sentences += [quality_sentence(compared), *_hedges(compared, part)]
    if not summary.empty and points["device_name"].iloc[0].startswith(CPU_PREFIX):
        sentences.append(
            "These are CPU numbers: speed and resident memory here say nothing about a GPU, "
            "where the balance of arithmetic and traffic is another."
        )
    sentences += _left_out(points)
    return [sentence for sentence in sentences if sentence]


def _nothing_to_compare(workload: str, part: pd.DataFrame) -> str:
    aligned = part[~part["misaligned"]]
    if aligned.empty:
        return f"{workload}: only misaligned shapes were measured, so nothing here supports a comparison."
    if aligned["is_dense"].all():
        return f"{workload}: only dense methods were measured, so there is no sparse method to judge."
    if not aligned["is_dense"].any():
        return (
            f"{workload}: no dense method was measured in this run, so no speed-up, memory saving or "
            "quality difference can be stated."
        )
    return f"{workload}: no sparse rule shares its shape with a measured dense method; nothing compares."


def name_of(line: pd.Series) -> str:
    """`moc_reference topk:0.1875 (K = 18.75 %)`."""
    return f"{wording.series_label(line['method'], line['selection'])} (K = {wording.percent(line['k_pct'])})"


def where(lines: pd.DataFrame) -> str:
    """Over which cells a statement goes: `60m at sequence length 256`, `4 shapes (1m and 4m, ...)`."""
    sizes = list(dict.fromkeys(wording.cell_label(line) for _, line in lines.iterrows()))
    ffn = str(lines["workload"].iloc[0]).startswith("ffn_")  # one layer sees tokens, not sequences
    name = "tokens" if ffn else "seq_len"
    amounts = wording.listing([f"{value:,.0f}" for value in sorted(set(lines[name]))])
    what = f"{amounts} tokens" if ffn else f"sequence length {amounts}"
    if len(lines) == 1:
        return f"{sizes[0]} at {what}"
    return f"{len(lines)} settings ({wording.listing(sizes)}; {what})"


def speed_sentence(lead: pd.DataFrame, part: pd.DataFrame) -> str:
    """How fast the lead series is against the fastest dense method of the same run."""
    line = lead.iloc[0]
    if lead["x_best_dense"].isna().all():
        return ""
    names, does = wording.names(lead["baseline"]), WORKLOADS[line["workload"]].does
    interval = ""
    if len(lead) == 1 and not math.isnan(line["x_best_dense_ci_low"]):
        interval = f", 95 % interval {line['x_best_dense_ci_low']:.3g} to {line['x_best_dense_ci_high']:.3g}"
    how = wording.by_pairing(
        lead["paired"],
        every="paired ratio",
        some="paired ratio, unpaired where the faster dense method was measured later",
        none="unpaired: each was measured in a process of its own",
    )
    figures = ""
    if len(lead) == 1 and not math.isnan(line["speed"]):
        dense = part[(part["cell"] == line["cell"]) & (part["method"] == line["baseline"])].iloc[0]
        figures = f"{wording.number(line['speed'])} against {wording.number(dense['speed'])} tokens/s, "
    sentence = (
        f"{name_of(line)} {does} at {wording.span(lead['x_best_dense'], wording.ratio)} the speed of the"
        f" fastest dense method of the same run ({names}; {figures}{how}{interval}) in {where(lead)}."
    )
    return sentence + _fastest_other(line, lead, part) + _noise(lead)


def _noise(lead: pd.DataFrame) -> str:
    half = (lead["x_best_dense_ci_high"] - lead["x_best_dense_ci_low"]) / 2 / lead["x_best_dense"]
    noisy = int((half > NOISY_RATIO).sum())
    if not noisy:
        return ""
    subject = "Its interval is" if len(lead) == 1 else f"In {noisy} of {len(lead)} settings the interval is"
    return f" {subject} wider than ± {100 * NOISY_RATIO:.0f} %: measure again on a quiet machine."


def _fastest_other(line: pd.Series, lead: pd.DataFrame, part: pd.DataFrame) -> str:
    known = ~part["is_dense"] & ~part["misaligned"] & part["x_best_dense"].notna()
    others = part[known & part["cell"].isin(set(lead["cell"]))]
    means = others.groupby(["method", "selection"])["x_best_dense"].mean().sort_values()
    if means.empty or means.index[-1] == (line["method"], line["selection"]):
        return ""
    method, selection = means.index[-1]
    best = others[(others["method"] == method) & (others["selection"] == selection)]
    reached = wording.span(best["x_best_dense"], wording.ratio)
    return f" The fastest that is not dense is {wording.series_label(method, selection)}, at {reached}."


def memory_sentence(lead: pd.DataFrame) -> str:
    """Peak memory and saved bytes against the leanest dense method of equal or better speed."""
    peak = lead[lead["memory_change"].notna()]
    saved = lead[lead["saved_change"].notna()]
    clauses = []
    if not peak.empty:
        against = _against(peak, "memory_change", _dense_methods(peak, "leanest"), "leanest")
        clauses.append(f"Its {wording.peak_name(peak['peak_metric'].iloc[0])} is {against}")
    if not saved.empty:
        kept = wording.span(saved["saved_activation_bytes_per_token"], lambda value: f"{value:,.0f}")
        dense = _dense_methods(saved, "saved_leanest")
        if clauses and dense == _dense_methods(peak, "leanest"):
            dense = "the same method"
        subject = f"{'one' if clauses else 'One'} FFN layer keeps {kept} bytes a token for backward"
        clauses.append(f"{subject}, {_against(saved, 'saved_change', dense, 'saved_leanest')}")
    return "; ".join(clauses) + "." if clauses else ""


def _against(lead: pd.DataFrame, change: str, dense: str, who: str) -> str:
    """`20 % above dense_recompute, the leanest ..., and 70 % below dense_compiled, the fastest`."""
    clause = f"{wording.change(lead[change])} {dense}"
    fastest = lead[f"{change}_fastest"]
    if (lead[who] != lead["baseline"]).any() and fastest.notna().any():
        clause += f", and {wording.change(fastest)} {wording.names(lead['baseline'])}, the fastest"
    return clause


def _dense_methods(lead: pd.DataFrame, who: str) -> str:
    """The methods in the column `who`, and what they are among the dense methods."""
    names = wording.names(lead[who])
    if lead["dense_as_fast"].all():
        return f"{names}, the leanest dense method of equal or better speed"
    if not lead["dense_as_fast"].any():
        return f"{names}, the fastest dense method (none is as fast)"
    return f"{names}, the leanest dense method of equal or better speed (the fastest where none is)"


def quality_sentence(lead: pd.DataFrame) -> str:
    """Validation perplexity against dense: percent, nats and their uncertainty."""
    known = lead[lead["loss_gap"].notna()]
    if known.empty:
        return ""
    line = known.iloc[0]
    percent = wording.span(known["perplexity_change"], lambda value: f"{wording.signed(value, 1)} %")
    nats = wording.span(known["loss_gap"], lambda value: wording.signed(value, 3))
    budget = wording.span(known["train_tokens"], wording.tokens)
    figures = f"{wording.number(line['perplexity'], 4)}, " if len(known) == 1 else ""
    halves, doubt = (known["loss_gap_ci_high"] - known["loss_gap_ci_low"]) / 2, ""
    if halves.notna().any():
        each = " ±" if len(known) == 1 else ", each ±"
        doubt = f"{each} {wording.span(halves, lambda value: f'{value:.3f}')}"
    verdict = "; no difference shows within that uncertainty" if gaps_hold_zero(known) else ""
    return (
        f"After {budget} training tokens its validation perplexity is {figures}{percent} from dense "
        f"({nats} nats{doubt}, {_source_of_doubt(known)}{verdict})."
    )


def _source_of_doubt(known: pd.DataFrame) -> str:
    seeds = int(known["seeds"].min())
    if seeds >= SEEDS_FOR_INTERVAL:
        return f"95 % over {seeds} seeds"
    if known["loss_gap_ci_low"].isna().all():
        return "no interval measured"
    if known["gap_paired"].all():
        return "95 % over the same windows of validation text, paired; one seed's noise is not in it"
    return "interval of the validation text alone, the two runs taken as independent"


def _hedges(lead: pd.DataFrame, part: pd.DataFrame) -> list[str]:
    seeds = int(part.loc[part["cell"].isin(lead["cell"]), "seeds"].min())
    hedges = []
    if seeds == 1:
        hedges.append(f"there is one seed, so seed noise of {wording.SEED_NOISE} is unseen")
    elif seeds == 2:
        hedges.append(f"two seeds cannot measure seed noise, which is {wording.SEED_NOISE}")
    ratio = lead["tokens_per_parameter"]
    if ratio.notna().any() and ratio.max() < SHORT_RUN_TOKENS_PER_PARAMETER:
        hedges.append(
            f"the runs saw {wording.span(ratio, lambda value: wording.number(value, 2))} tokens per"
            " parameter, and runs this short favour sparsity: the order of methods changes with the budget,"
            " so read the trend over tokens and claim nothing about full training"
        )
    joined = "; ".join(hedges)
    return [f"{joined[0].upper()}{joined[1:]}."] if joined else []


def _left_out(points: pd.DataFrame) -> list[str]:
    sentences = []
    failed = failures(points)
    if not failed.empty:
        counts = failed["status"].value_counts()
        kinds = ", ".join(f"{count} {status}" for status, count in counts.items())
        sentences.append(f"{len(failed)} of {len(points)} points failed ({kinds}); they are listed below.")
    off = points[points["misaligned"] & points["measured"]]
    if not off.empty:
        shapes = wording.listing(sorted({wording.cell_label(line) for _, line in off.iterrows()}))
        sentences.append(
            f"Misaligned shapes ({shapes}: a width that is not a multiple of 8) are in the tables and in no "
            "headline: dense GEMMs leave their fast path there, which favours every other method."
        )
    unstable = points[points["status"] == "unstable"]
    if not unstable.empty:
        sentences.append(
            f"{len(unstable)} of {len(points)} points reached their time cap before the wanted precision and "
            "are marked unstable."
        )
    return sentences
