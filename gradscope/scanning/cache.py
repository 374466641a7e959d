"""Facts and whole results kept on disk, keyed by content: the same bytes and the same gradscope give the same.

One SQLite file, which takes concurrent runs; a cache that cannot be used is put aside and the scan goes on without.
Values are JSON, each with its digest: reading a cache never runs anything, and what is read is what was written.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import sys
from collections.abc import Iterable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

LARGEST = 200_000_000  # bytes; above it the whole cache is dropped and begun anew
PER_QUERY = 500


def default_folder() -> Path:
    """Return where caches belong on this machine (``GRADSCOPE_CACHE_DIR``, then the XDG folder)."""
    given = os.environ.get("GRADSCOPE_CACHE_DIR")
    if given:
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "gradscope"


@lru_cache(maxsize=1)
def own_version() -> str:
    """Return a digest of the source that makes the values kept and the Python that parses: either may change them."""
    digest = hashlib.sha256(repr(sys.version_info[:3]).encode())
    own = Path(__file__).parent
    for path in (*sorted(own.glob("*.py")), own.parent / "session.py", own.parent / "findings.py"):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def key_of(*parts: str | bytes) -> str:
    """Return the key of some content under this version of the scanner."""
    digest = hashlib.sha256(own_version().encode())  # processors have instructions for it
    for part in parts:
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


class Cache:
    """A store of JSON values by key; every failure of it is a miss, never an error of the scan."""

    def __init__(self, folder: Path | None) -> None:
        self._database: sqlite3.Connection | None = None
        if folder is not None:
            self._open(folder / "scan.sqlite")

    def _open(self, path: Path) -> None:
        for _ in range(2):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                if path.exists() and path.stat().st_size > LARGEST:
                    path.unlink()
                database = sqlite3.connect(path, timeout=2)
                # To wait for the disk can take long while others write; what a crash leaves is found out by its digest.
                database.execute("pragma synchronous = off")
                database.execute("pragma journal_mode = wal")
                database.execute(
                    "create table if not exists entries (key text primary key, digest text, value text) without rowid"
                )
            except sqlite3.DatabaseError:
                with suppress(OSError):
                    path.unlink()  # corrupt or not a database: begin anew
            except OSError:
                return
            else:
                self._database = database
                return

    @property
    def is_open(self) -> bool:
        """Whether anything can be kept at all."""
        return self._database is not None

    def get(self, keys: Iterable[str]) -> dict[str, Any]:
        """Return what is kept under these keys."""
        found: dict[str, Any] = {}
        wanted = list(keys)
        if self._database is None:
            return found
        try:
            for at in range(0, len(wanted), PER_QUERY):
                part = wanted[at : at + PER_QUERY]
                marks = ",".join("?" * len(part))
                query = f"select key, digest, value from entries where key in ({marks})"
                for key, digest, value in self._database.execute(query, part):
                    if digest == _digest(str(value)):
                        found[key] = json.loads(value)
        except (sqlite3.Error, ValueError):
            return {}
        return found

    def put(self, values: dict[str, Any]) -> None:
        """Keep values under their keys."""
        if self._database is None or not values:
            return
        texts = {key: json.dumps(value, separators=(",", ":")) for key, value in values.items()}
        rows = [(key, _digest(text), text) for key, text in texts.items()]
        with suppress(sqlite3.Error), self._database:
            self._database.executemany("insert or replace into entries values (?, ?, ?)", rows)

    def close(self) -> None:
        """Close the file."""
        if self._database is not None:
            self._database.close()
            self._database = None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
