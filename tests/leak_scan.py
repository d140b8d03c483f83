"""Search everything below some folders for texts that must not be there, also inside databases and archives."""

import base64
import gzip
import json
import sqlite3
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

import pyarrow.parquet as pq


def forms(text: str) -> set[bytes]:
    """A text as it is, folded, as JSON and URLs write it; and each of them as dumps and messages write bytes."""
    plain = {text, text.casefold(), json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1], quote(text)}
    raw = {one.encode() for one in plain}
    return raw | {form for one in raw for form in (one.hex().encode(), one.hex().upper().encode(), *_in_base64(one))}


def _in_base64(raw: bytes) -> list[bytes]:
    """Base64 of bytes wherever they stand in a longer value, without the characters that their neighbours change."""
    shifted = (base64.b64encode(bytes(before) + raw)[(0, 2, 3)[before] :] for before in range(3))
    return [one[: (8 * len(raw) - (0, 4, 2)[before]) // 6] for before, one in enumerate(shifted)]


def contents(path: Path) -> Iterator[bytes]:
    """The file's bytes, and what they are an image of: SQL of a SQLite file, columns of Parquet, unpacked archives."""
    raw = path.read_bytes()
    yield raw
    if raw.startswith(b"SQLite format 3"):
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
            yield "\n".join(database.iterdump()).encode()  # long values lie in pieces in the file; bytes as hex
    elif raw.startswith(b"PAR1"):
        yield json.dumps(pq.read_table(path).to_pydict(), default=str, ensure_ascii=False).encode()
    elif raw.startswith(b"\x1f\x8b"):
        yield gzip.decompress(raw)
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            yield from (archive.read(name) for name in archive.namelist())


def leaks(folders: Iterable[Path], texts: Iterable[str]) -> list[str]:
    """Files in which one of the texts stands."""
    needles = {form for text in texts for form in forms(text)}
    files = [
        path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink()
    ]
    assert files, "nothing to search"
    return [str(path) for path in files if any(needle in part for part in contents(path) for needle in needles)]
