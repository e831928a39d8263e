"""Lets the library run on Linux older than the one that builds it: from glibc 2.28 on.

glibc keeps the older versions of its symbols for programs that ask for them; the linker asks for
the newest. Stand-ins for glibc's libraries that define those symbols in the newest version which
``OLDEST`` has, and nothing else, are linked before the real ones (CUDA's static runtime alone uses
46 symbols that moved into libc.so.6 with 2.34). csrc/compat.cpp does the same for libstdc++.
"""

from __future__ import annotations

import re
import subprocess
from collections import defaultdict
from pathlib import Path

OLDEST = (2, 28)  # of manylinux_2_28
# Where OLDEST has what is in these libraries now.
HOMES = {
    "libc.so.6": {
        "libpthread.so.0": "pthread_|sem_", "libdl.so.2": "dl", "librt.so.1": "shm_|timer_",
    },
    "libm.so.6": {"libm.so.6": ""},
}  # fmt: skip


def stand_ins(compiler: str, folder: Path) -> list[Path]:
    """The libraries to link before glibc's own, made in ``folder``; none where glibc is none.

    The folder must hold nothing else: nvcc's programs load libraries from where they are started.
    """
    folder.mkdir(exist_ok=True)
    made = []
    for soname, versions in sorted(_older(compiler).items()):
        path = folder / soname
        made.append(path)
        if path.exists():
            continue
        names = [name for found in versions.values() for name in found]
        code = "".join(f".globl {n}\n.type {n}, @function\n{n}:\n" for n in names)
        script = "".join(f"{v} {{ {'; '.join(n)}; }};\n" for v, n in sorted(versions.items()))
        source, symbols = path.with_suffix(".s"), path.with_suffix(".map")
        source.write_text(f'{code}.section .note.GNU-stack, ""\n')
        symbols.write_text(script)
        link = compiler, "-shared", "-nostdlib", source, "-o", path, f"-Wl,-soname,{soname}"
        subprocess.run([*map(str, link), f"-Wl,--version-script={symbols}"], check=True)
    return made


def _older(compiler: str) -> dict[str, dict[str, list[str]]]:
    """By library and version: the symbols of which the linker would take a version too new."""
    found: dict = defaultdict(lambda: defaultdict(list))
    for real in HOMES:
        ask = [compiler, f"-print-file-name={real}"]
        path = subprocess.run(ask, capture_output=True, text=True).stdout.strip()
        if not Path(path).is_absolute():
            continue
        listed = subprocess.run(["objdump", "-T", path], capture_output=True, text=True).stdout
        # the one that the linker takes is not in brackets
        symbols = re.findall(r" DF \.text\s+\S+\s+(\(?)GLIBC_([\d.]+)\)?\s+(\w+)$", listed, re.M)
        versions: dict = defaultdict(list)
        newest = {}
        for bracket, text, name in symbols:
            version = tuple(map(int, text.split(".")))
            versions[name].append(version)
            if not bracket:
                newest[name] = version
        for name, version in newest.items():
            old = [v for v in versions[name] if v <= OLDEST]
            if version > OLDEST and old:
                homes = [home for home, names in HOMES[real].items() if re.match(names, name)]
                for home in homes:
                    found[home]["GLIBC_" + ".".join(map(str, max(old)))].append(name)
    return found
