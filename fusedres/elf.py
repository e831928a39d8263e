"""What a compiled library says of itself on disk: whether it is whole, and for which GPUs.

ELF-64: System V ABI, chapter 4. CUDA's fat binary has no public description: its layout is as nvcc
12.8 to 13.0 write it, and a test compares what is read here with what cuobjdump lists.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

FATBIN_MAGIC = 0xBA55ED50
MACHINE_CODE = 2  # an entry's kind; 1 is PTX
THAT_CHIP, THE_FAMILY = 1 << 20, 1 << 21  # an entry's flags: "a" and "f" behind the number


def _header(file: BinaryIO) -> tuple[str, int, int, int, int] | None:
    """Byte order, and of the table of sections: offset, entry size, entries, the one of names."""
    head = file.read(64)
    if len(head) < 64 or head[:5] != b"\x7fELF\x02":
        return None
    order = "<" if head[5] == 1 else ">"
    return order, *struct.unpack_from(order + "Q", head, 40), *struct.unpack_from(
        order + "3H", head, 58
    )  # fmt: skip


def is_cut_short(path: Path) -> bool:
    """Whether an ELF file ends before its table of sections, the last thing in it, does.

    dlopen maps such a file and dies of SIGBUS, where an error could not be caught.
    """
    with path.open("rb") as file:
        header = _header(file)
    if header is None:
        return False  # dlopen says what is wrong with it
    _, offset, size, number, _ = header
    return offset + size * number > path.stat().st_size


def _section(file: BinaryIO, wanted: bytes) -> bytes:
    """The content of a section; empty where the file has none of this name."""
    header = _header(file)
    if header is None:
        return b""
    order, offset, size, number, names_at = header
    file.seek(offset)
    table = file.read(size * number)
    # of each: its name's place among the names, where it starts, how long it is
    entries = [
        (*struct.unpack_from(order + "I", table, i * size), *struct.unpack_from(
            order + "2Q", table, i * size + 24
        ))
        for i in range(number)
    ]  # fmt: skip
    _, start, length = entries[names_at]
    file.seek(start)
    names = file.read(length)
    for name, start, length in entries:
        if names[name : names.index(b"\0", name)] == wanted:
            file.seek(start)
            return file.read(length)
    return b""


def cuda_archs(path: Path) -> tuple[str, ...]:
    """The GPU architectures that a library has machine code for, in ascending order."""
    with path.open("rb") as file:
        fat = _section(file, b".nv_fatbin")
    found = set(_architectures(fat))
    return tuple(sorted(found, key=lambda arch: (int(arch.rstrip("af")), arch)))


def _architectures(fat: bytes) -> Iterator[str]:
    at = 0
    while at + 16 <= len(fat):
        magic, _, head, size = struct.unpack_from("<IHHQ", fat, at)
        if magic != FATBIN_MAGIC:  # the padding between two of them
            at += 8
            continue
        entry, at = at + head, at + head + size
        while entry < at:
            kind, _, head, size = struct.unpack_from("<HHIQ", fat, entry)
            number, flags = struct.unpack_from("<I8xI", fat, entry + 28)
            if kind == MACHINE_CODE:
                suffix = "a" if flags & THAT_CHIP else "f" if flags & THE_FAMILY else ""
                yield f"{number}{suffix}"
            entry += head + size
