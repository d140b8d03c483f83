"""What the search for leaks finds: a text in each of the ways in which files hold one."""

import base64
import gzip
import sqlite3
import zipfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from leak_scan import leaks

TEXT = "Wo wurde Åsa Öberg geboren?"


def in_sqlite(path: Path, convert: Callable[[bytes], str | bytes]) -> None:
    """As a value of which SQLite keeps the first 490 bytes or so in the row and the others elsewhere."""
    value = convert((b"x" * 470 + TEXT.encode()).ljust(4580, b"x"))
    with closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE payloads (value)")
        database.execute("INSERT INTO payloads VALUES (?)", [value])
        database.commit()
    assert TEXT.encode() not in path.read_bytes()


def in_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("log", TEXT * 3)


ways = {
    "folded": lambda path: path.write_text(f"x{TEXT.casefold()}x"),
    "SQL dump of bytes": lambda path: path.write_text(rf"VALUES ('a', '\x{('{' + TEXT).encode().hex()}');"),
    "upper-case hex": lambda path: path.write_text(f"X'{TEXT.encode().hex().upper()}'"),
    **{
        f"base64 after {before} bytes": lambda path, before=before: path.write_bytes(
            base64.b64encode(b"x" * before + TEXT.encode() + b"yz")
        )
        for before in range(7)
    },
    "SQLite text in pieces": lambda path: in_sqlite(path, bytes.decode),
    "SQLite bytes in pieces": lambda path: in_sqlite(path, bytes),
    "Parquet": lambda path: pq.write_table(pa.table({"text": [TEXT] * 3}), path, compression="zstd"),
    "gzip": lambda path: path.write_bytes(gzip.compress(TEXT.encode() * 3)),
    "zip": in_zip,
}


@pytest.mark.parametrize("way", ways)
def test_a_text_is_found(way: str, tmp_path: Path) -> None:
    ways[way](tmp_path / "file")
    (tmp_path / "other").write_text(TEXT[:-2])
    assert leaks([tmp_path], [TEXT]) == [str(tmp_path / "file")]
