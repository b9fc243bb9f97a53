"""Layouts of the decoding kernels that are worth trying: today's, and changes to it.

They differ in what a program holds, in how loads get on their way (wide tiles, unrolled, through shared
memory, prefetched), in how rows are picked (gathered or masked), in how sums are made (float atomics, or
parts and a second kernel), in how many kernels there are, and in whether they overlap.
"""

from __future__ import annotations

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
    """One kernel. What decides is how many programs a multiprocessor holds at once, by registers."""
    for channels, columns, warps, registers, stages, unroll, up_columns in [
        (16, 512, 4, 168, 1, 1, 2048), (16, 512, 4, 168, 1, 1, 1024), (16, 512, 4, 128, 1, 1, 1024),
        (16, 256, 4, 128, 1, 1, 1024), (16, 256, 4, 168, 1, 2, 1024), (16, 256, 4, 168, 3, 1, 2048),
        (16, 256, 4, 128, 3, 1, 1024), (16, 128, 4, 128, 6, 1, 1024), (16, 512, 8, 80, 1, 1, 2048),
        (16, 512, 8, 80, 3, 1, 2048), (16, 1024, 8, 128, 1, 1, 2048),
        (32, 256, 4, 0, 1, 1, 2048), (32, 256, 4, 168, 1, 1, 1024), (32, 256, 4, 168, 1, 1, 512),
        (32, 256, 4, 0, 1, 1, 1024), (32, 128, 4, 168, 4, 1, 1024), (32, 128, 4, 168, 1, 2, 1024),
        (32, 256, 4, 168, 3, 1, 1024), (32, 256, 4, 0, 3, 1, 1024), (32, 256, 4, 128, 1, 1, 512),
        (32, 512, 8, 128, 1, 1, 2048), (32, 512, 8, 128, 1, 1, 1024), (32, 256, 8, 128, 1, 1, 2048),
        (32, 256, 8, 128, 1, 2, 1024), (32, 256, 8, 128, 3, 1, 2048), (32, 512, 8, 0, 1, 1, 2048),
        (64, 256, 8, 128, 1, 1, 1024), (64, 256, 8, 0, 1, 1, 1024), (64, 128, 8, 128, 4, 1, 1024),
        (64, 256, 8, 0, 3, 1, 1024), (64, 256, 16, 0, 1, 1, 1024), (64, 512, 16, 0, 1, 1, 2048),
        (64, 256, 16, 0, 3, 1, 1024),
    ]:  # fmt: skip
        if channels >= today.channels // 2:
            slots = today.slots * channels // today.channels
            yield replace(
                today, channels=channels, columns=columns, slots=slots, num_warps=warps, registers=registers,
                stages=stages, unroll=unroll, up_columns=up_columns,
            )  # fmt: skip
    yield replace(today, down_columns=512)
    yield replace(today, down_columns=2048)
    yield from _plainer(today)
    for channels, slots, columns in [(8, 2, 1024), (16, 4, 512), (32, 8, 256)]:
        for down in (DownTile(128, 512, 16), DownTile(256, 512, 16), DownTile(256, 256, 16, num_warps=8)):
            if channels >= today.channels // 4:
                yield replace(today, channels=channels, slots=slots, columns=columns, down=down)


def _for_wide_banks(today: DecodeTiling) -> Iterator[DecodeTiling]:
    """Banks too large for several to a program: all in one kernel, or the gates in one of their own."""
    for columns, stages, warps, slots, up_columns, down_columns in [
        (256, 1, 8, 16, 512, 2048), (128, 6, 8, 16, 512, 1024), (128, 8, 8, 16, 512, 1024),
        (256, 3, 8, 16, 512, 1024), (256, 4, 8, 16, 512, 1024), (128, 4, 8, 16, 1024, 1024),
        (256, 3, 16, 16, 1024, 1024), (512, 2, 16, 16, 1024, 1024), (256, 1, 16, 16, 1024, 2048),
        (512, 1, 16, 16, 1024, 2048), (256, 4, 16, 16, 1024, 2048), (256, 6, 16, 16, 1024, 2048),
        (256, 1, 8, 16, 1024, 1024), (256, 1, 8, 4, 2048, 2048), (128, 1, 8, 16, 512, 1024),
        (128, 4, 4, 16, 512, 512),
    ]:  # fmt: skip
        yield replace(
            today, gate=None, parts=1, columns=columns, stages=stages, num_warps=warps, slots=slots,
            up_columns=up_columns, down_columns=down_columns,
        )  # fmt: skip
    yield from _gates(today)
    for slots, parts, up_columns, warps, registers in [
        (4, 3, 1024, 4, 0), (4, 3, 2048, 4, 168), (16, 1, 512, 4, 0), (16, 1, 512, 8, 128),
        (16, 1, 1024, 8, 0), (8, 2, 1024, 4, 168), (8, 2, 512, 4, 128), (4, 3, 512, 4, 96),
        (16, 1, 256, 4, 168),
    ]:  # fmt: skip
        yield replace(
            today, slots=slots, parts=parts, up_columns=up_columns, num_warps=warps, registers=registers
        )
    yield replace(today, down_columns=2048)
    yield from _plainer(today)
    yield replace(today, down=DownTile(128, 512, 16))
    yield replace(
        today, gate=None, parts=1, columns=128, slots=16, up_columns=512, down=DownTile(128, 512, 16)
    )


def _plainer(today: DecodeTiling) -> Iterator[DecodeTiling]:
    yield replace(today, ahead=not today.ahead)
    yield replace(today, pdl=not today.pdl)
    yield replace(today, ahead=not today.ahead, pdl=not today.pdl)


def _gates(today: DecodeTiling) -> Iterator[DecodeTiling]:
    for gate in [
        Tile(8, 512), Tile(4, 1024), Tile(4, 2048), Tile(16, 512), Tile(8, 512, unroll=2), Tile(16, 256),
        Tile(8, 1024), Tile(4, 1024, 2), Tile(8, 512, stages=3), Tile(16, 512, stages=3), Tile(8, 1024, 8),
    ]:  # fmt: skip
        yield replace(today, gate=gate)


def _for_topk(today: DecodeTiling) -> Iterator[DecodeTiling]:
    yield from _gates(today)
    for channels, slots, up_columns, warps, registers in [
        (16, 8, 1024, 4, 168), (16, 8, 512, 4, 168), (16, 4, 2048, 4, 168), (16, 4, 1024, 4, 128),
        (32, 8, 1024, 4, 168), (32, 8, 1024, 4, 0), (32, 16, 512, 4, 0), (32, 16, 512, 4, 168),
        (32, 16, 1024, 8, 0), (32, 16, 1024, 8, 128), (32, 8, 2048, 8, 128), (32, 8, 1024, 8, 128),
        (64, 16, 512, 8, 128), (64, 16, 1024, 8, 0), (64, 16, 512, 4, 0), (64, 16, 512, 4, 168),
    ]:  # fmt: skip
        for cut_apart in (False, True):
            yield replace(
                today, channels=channels, slots=slots, up_columns=up_columns, num_warps=warps,
                registers=registers, cut_apart=cut_apart,
            )  # fmt: skip
    yield replace(today, down_columns=512)
    yield replace(today, down_columns=2048)
    yield from _plainer(today)
    yield replace(today, down=DownTile(128, 512, 16))


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
        (8, 1024, 4, 4), (8, 1024, 8, 4), (8, 2048, 4, 8), (16, 512, 8, 4), (32, 256, 4, 4),
    ]:  # fmt: skip
        yield replace(today, down=DownTile(rows, columns, rows, blocks, warps))
    yield replace(today, down=replace(today.down, stages=3, blocks=4))
    yield replace(today, pdl=not today.pdl)


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
    yield from _plainer(today)
    if selection is not None:
        yield replace(today, down=None, down_columns=128)
