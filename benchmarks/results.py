"""Results as JSON: what a file holds, reading one with every field checked, and writing one.

A file is one run: its head says on what machine, with which versions, from which commit and when;
its rows are the benchmarks, each written as soon as it is measured. Times are in seconds, memory in
bytes; a null was not measured.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

SCHEMA = 2
FOLDER = Path(__file__).parent / "results"


class ResultError(ValueError):
    """A file is no result; the message names the file, the field, what was wanted and what came."""


@dataclass(frozen=True)
class Maybe:
    """The field may be null."""

    kind: object


@dataclass(frozen=True)
class Each:
    """A mapping of any keys to one kind, or a list of one kind."""

    kind: object
    container: type = dict


class Positive:
    """A number above zero."""


_TIMES = {
    "rounds": int, "median": Positive, "q1": Positive, "q3": Positive, "least": Positive,
}  # fmt: skip
_FIGURES = {
    "peak": Maybe(int),
    "saved": Maybe(int),
    "launches": Maybe(int),
    "bytes_moved": Maybe(int),
    "gigabytes_per_second": Maybe(Positive),
    "percent_of_copy": Maybe(Positive),
    "percent_of_floor": Maybe(Positive),
    "note": Maybe(str),
}
OURS_FIELDS = _TIMES | _FIGURES
PEER_FIELDS = OURS_FIELDS | {
    "ratio": Positive, "halves": Maybe(Each(Positive, list)), "tie": bool,
}  # fmt: skip
ROW_HEAD = {"id": str, "suite": str, "status": str, "took_seconds": float}
WRONG = ROW_HEAD | {"reason": str}
MEASURED = ROW_HEAD | {
    "title": str,
    "device": str,
    "facts": dict,
    "competitors": dict,
    "missing": Each(str),
    "refused": Each(str),
    "graphs": str,
    "floor": Maybe({"seconds": Positive, "of": str}),
    "convolutions_alone": Maybe(Positive),
    "notes": Each(str, list),
    "other_load_cores": Maybe(float),
}
RATES = {"copy_bandwidth": Positive, "matmul": Each(Positive)}
HEAD = {
    "schema": int,
    "machine": {
        "cpu": str,
        "isa": str,
        "cores": int,
        "threads": int,
        "system": str,
        "measured": Each(RATES),
    },
    "gpu": Maybe({"name": str, "driver": Maybe(str)}),
    "versions": {"torch": str, "python": str},
    "commit": Maybe(str),
    "modified": Maybe(bool),
    "date": str,
    "backends": dict,
    "settings": {"seconds": Positive},
    "rows": list,
}


def load(path: Path) -> dict:
    """Read a result.

    Raises:
        ResultError: the file cannot be read, is not JSON, or a field of it is not what it must be.
    """
    try:
        found = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ResultError(f"{path}: cannot be read: {error}") from error
    except ValueError as error:
        raise ResultError(f"{path}: is not JSON: {error}") from error
    try:
        check(found)
    except ResultError as error:
        raise ResultError(f"{path}: {error}") from None
    return found


def load_folder(folder: Path = FOLDER) -> dict[str, dict]:
    """Every result in a folder by its file's name, the oldest first."""
    found = {path.name: load(path) for path in sorted(folder.glob("*.json"))}
    return dict(sorted(found.items(), key=lambda item: item[1]["date"]))


def check(found: object) -> None:
    """Raises ResultError, naming the first field that is not what it must be."""
    if isinstance(found, dict) and found.get("schema") not in (None, SCHEMA):
        raise ResultError(f"schema: wanted {SCHEMA}, got {found['schema']!r}")
    _check("", found, HEAD)
    seen = set()
    for i, row in enumerate(found["rows"]):
        where = f"rows[{i}]"
        _check(where, row, ROW_HEAD)
        if row["id"] in seen:
            raise ResultError(f"{where}.id: {row['id']!r} is there twice")
        seen.add(row["id"])
        if row["status"] not in ("measured", "wrong"):
            raise ResultError(f"{where}.status: wanted measured or wrong, got {row['status']!r}")
        _check(where, row, MEASURED if row["status"] == "measured" else WRONG)
        for j, (name, figures) in enumerate(row.get("competitors", {}).items()):
            fields = PEER_FIELDS if j else OURS_FIELDS
            _check(f"{where}.competitors[{name!r}]", figures, fields)
        if row["status"] == "measured" and not row["competitors"]:
            raise ResultError(f"{where}.competitors: wanted ours at least, got none")


def _check(where: str, value: object, kind: object) -> None:
    if isinstance(kind, Maybe):
        if value is not None:
            _check(where, value, kind.kind)
    elif isinstance(kind, Each):
        _want(where, value, kind.container)
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            _check(f"{where}[{key!r}]", item, kind.kind)
    elif isinstance(kind, Mapping):
        _want(where, value, dict)
        for name, inner in kind.items():
            path = f"{where}.{name}" if where else name
            if name not in value:
                raise ResultError(f"{path}: is missing")
            _check(path, value[name], inner)
    else:
        _want(where, value, kind)


_WORDS = {
    dict: "an object", list: "a list", str: "a string", int: "a whole number", float: "a number",
    bool: "true or false", Positive: "a number above 0",
}  # fmt: skip


def _want(where: str, value: object, kind: type) -> None:
    types = {float: (int, float), Positive: (int, float)}.get(kind, (kind,))
    fits = isinstance(value, types) and (kind is bool or not isinstance(value, bool))
    if not fits or (kind is Positive and not 0 < value < float("inf")):
        raise ResultError(f"{where or 'the file'}: wanted {_WORDS[kind]}, got {_short(value)}")


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def save(path: Path, found: dict) -> None:
    """Write whole or not at all: an interrupt leaves the file as it was."""
    check(found)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(found, indent=1) + "\n")
    partial.replace(path)
