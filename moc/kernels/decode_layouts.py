"""Layouts of the decoding kernels that are worth trying: today's, and changes to it.

They differ in what a program holds, in how loads get on their way (wide tiles, unrolled, through shared
memory, prefetched), in how rows are picked (gathered or masked), in how sums are made (float atomics, or
parts and a second kernel), in how many kernels there are, and in whether they overlap.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

from moc.kernels.decode_launch import DecodeTiling, DownTile, Tile, decode_tiling
from moc.selection import Selection, parse_selection


def layouts(rule: str, d_ffn: int, several: bool) -> list[DecodeTiling]:
    """What is tried; the first is what runs today."""
    selection = None if rule == "dense" else parse_selection(rule)
    today = decode_tiling(d_ffn, selection, 16 if several else 1)
    if several:
        found = _for_several(today, selection)
    elif selection is None:
        found = _for_dense(today)
    elif selection.rule == "nm":
        found = _for_banks(today) if today.gate is None else _for_wide_banks(today)
    else:
        found = _for_topk(today)
    return list(dict.fromkeys([today, *found]))


def _for_banks(today: DecodeTiling) -> Iterator[DecodeTiling]:
    size = today.channels
    for factor, columns, warps, unroll, stages in [
        (1, 1.0, 4, 2, 1), (1, 0.5, 4, 1, 1), (1, 0.5, 4, 2, 1), (1, 2.0, 8, 1, 1), (1, 1.0, 8, 1, 1),
        (1, 0.5, 4, 1, 3), (1, 1.0, 4, 1, 3), (1, 0.5, 2, 1, 1), (1, 0.25, 2, 2, 1),
        (2, 0.5, 4, 1, 1), (2, 1.0, 8, 1, 1), (2, 0.25, 4, 1, 4), (4, 0.25, 4, 1, 1), (4, 0.5, 8, 1, 1),
        (0.5, 2.0, 4, 1, 1), (0.5, 1.0, 2, 1, 1),
    ]:  # fmt: skip
        channels, slots = int(size * factor), max(1, min(32, int(today.slots * factor)))
        if channels >= 8:
            yield replace(
                today, channels=channels, columns=max(64, int(today.columns * columns)), slots=slots,
                num_warps=warps, unroll=unroll, stages=stages, down_columns=256 * warps,
            )  # fmt: skip
    yield replace(today, slots=today.channels, up_columns=today.columns, down_columns=512)
    yield replace(today, up_columns=max(256, today.up_columns // 2))
    yield replace(today, up_columns=today.up_columns * 2)
    yield replace(today, down_columns=2048)
    yield from (replace(today, registers=count) for count in (96, 128, 168))
    yield from _overlapping(today)
    for down in _downs():
        yield replace(today, down=down)
    yield replace(today, down=DownTile(128, 256, 16), pdl=True)
    yield replace(today, gate=Tile(8, 1024))
    yield replace(today, gate=Tile(8, 1024), pdl=True)


def _for_wide_banks(today: DecodeTiling) -> Iterator[DecodeTiling]:
    for slots, parts, up_columns, warps in [
        (4, 3, 1024, 4), (2, 6, 1024, 4), (8, 2, 1024, 4), (16, 1, 512, 4), (4, 3, 2048, 8), (4, 3, 512, 2),
        (2, 6, 2048, 4), (1, 12, 2048, 4), (4, 4, 512, 4),
    ]:  # fmt: skip
        yield replace(
            today, slots=slots, parts=parts, up_columns=up_columns, num_warps=warps, down_columns=256 * warps
        )
    yield from _gates(today)
    yield from _overlapping(today)
    for down in _downs():
        yield replace(today, down=down)
    yield replace(today, down=DownTile(128, 256, 16), pdl=True)
    # All in one kernel, a bank to a program.
    for columns, up_columns, warps, slots in [
        (128, 512, 4, 16), (256, 512, 8, 16), (128, 1024, 4, 4), (256, 1024, 8, 4), (128, 512, 8, 8),
    ]:  # fmt: skip
        one = replace(today, gate=None, parts=1, columns=columns, up_columns=up_columns, slots=slots)
        yield replace(one, num_warps=warps, down_columns=256 * warps)
    yield replace(
        today, gate=None, parts=1, columns=128, slots=16, up_columns=512, down=DownTile(128, 256, 16)
    )


def _overlapping(today: DecodeTiling) -> Iterator[DecodeTiling]:
    yield replace(today, prefetch=2048)
    yield replace(today, pdl=True)
    yield replace(today, pdl=True, prefetch=2048)


def _gates(today: DecodeTiling) -> Iterator[DecodeTiling]:
    for gate in [
        Tile(4, 2048), Tile(16, 512), Tile(8, 512), Tile(8, 512, unroll=2), Tile(8, 1024, unroll=2),
        Tile(8, 2048, 8), Tile(16, 1024, 8), Tile(8, 1024, stages=3), Tile(16, 512, stages=4),
        Tile(4, 1024, 2), Tile(32, 256),
    ]:  # fmt: skip
        yield replace(today, gate=gate)


def _downs() -> Iterator[DownTile]:
    yield DownTile(128, 256, 16)
    yield DownTile(64, 256, 16)
    yield DownTile(128, 512, 16)
    yield DownTile(64, 512, 16, num_warps=8)
    yield DownTile(256, 128, 32)
    yield DownTile(32, 512, 32)  # masked


def _for_topk(today: DecodeTiling) -> Iterator[DecodeTiling]:
    yield from _gates(today)
    for channels, slots, warps in itertools.product((16, 32, 64), (4, 8, 16), (4, 8)):
        if slots < channels:
            yield replace(today, channels=channels, slots=slots, num_warps=warps, down_columns=256 * warps)
    yield replace(today, slots=today.channels, up_columns=512, down_columns=512)
    yield replace(today, up_columns=256)
    yield replace(today, up_columns=1024)
    yield replace(today, up_columns=2048)
    yield replace(today, unroll=2)
    yield replace(today, registers=128)
    yield replace(today, registers=168)
    yield replace(today, registers=128, channels=16, up_columns=512)
    yield replace(today, cut_apart=True)
    yield from _overlapping(today)
    yield replace(today, pdl=True, cut_apart=True)
    for down in _downs():
        yield replace(today, down=down)
    yield replace(today, down=DownTile(128, 256, 16), pdl=True)


def _for_dense(today: DecodeTiling) -> Iterator[DecodeTiling]:
    assert today.down is not None
    for channels, columns, warps, unroll in [
        (16, 256, 4, 1), (16, 256, 4, 2), (8, 1024, 4, 1), (8, 512, 4, 2), (16, 1024, 8, 1), (32, 256, 4, 1),
        (32, 512, 8, 1), (4, 1024, 4, 1), (4, 2048, 4, 1),
    ]:  # fmt: skip
        yield replace(
            today, channels=channels, slots=channels, columns=columns, num_warps=warps, unroll=unroll
        )
    yield replace(today, stages=3)
    for rows, columns, blocks, warps in [
        (16, 512, 1, 4), (16, 512, 4, 4), (32, 256, 1, 4), (32, 256, 2, 4), (16, 1024, 2, 8), (32, 512, 2, 8),
        (8, 1024, 4, 4), (64, 256, 1, 8),
    ]:  # fmt: skip
        yield replace(today, down=DownTile(rows, columns, rows, blocks, warps))
    yield replace(today, down=replace(today.down, stages=3, blocks=4))
    yield replace(today, pdl=True)
    yield replace(today, pdl=True, prefetch=2048)


def _for_several(today: DecodeTiling, selection: Selection | None) -> Iterator[DecodeTiling]:
    assert today.down is not None
    for channels, columns, warps, stages in [
        (1, 64, 4, 6), (1, 256, 4, 3), (1, 128, 2, 4), (1, 256, 8, 4), (2, 128, 4, 4), (2, 64, 4, 6),
        (1, 128, 4, 6),
    ]:  # fmt: skip
        size = today.channels * channels
        yield replace(
            today, channels=size, slots=size, columns=columns, up_columns=columns, num_warps=warps,
            stages=stages,
        )  # fmt: skip
        if today.gate is not None:
            yield replace(today, gate=Tile(16 * channels, columns, warps, stages))
    if selection is not None and today.channels > 16:
        yield replace(today, slots=16)
    for rows, columns, blocks, warps, stages in [
        (32, 64, 12, 4, 4), (32, 64, 24, 4, 4), (64, 64, 8, 4, 3), (32, 128, 16, 4, 4), (16, 128, 32, 4, 6),
        (32, 256, 16, 4, 3), (32, 32, 16, 2, 6),
    ]:  # fmt: skip
        yield replace(today, down=DownTile(rows, columns, rows, blocks, warps, stages))
    yield replace(today, down=DownTile(128, 64, 32, blocks=4))
    yield replace(today, pdl=True)
    if selection is not None:
        yield replace(today, down=None, down_columns=128)
