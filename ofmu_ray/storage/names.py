"""Local paths and URIs (s3://, gs://) as text."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote

PathLike = str | os.PathLike[str]


def is_uri(path: PathLike) -> bool:
    """Whether `path` names a remote place such as s3://bucket/key (file:// counts as local)."""
    text = os.fspath(path)
    return "://" in text and not text.startswith("file://")


def local_path(path: PathLike) -> Path:
    """The absolute local path of a path or a file:// URI.

    Raises:
        ValueError: the path is remote.
    """
    if is_uri(path):
        raise ValueError(f"{without_credentials(path)} is not a local path")
    text = os.fspath(path)
    text = unquote(text.removeprefix("file://")) if text.startswith("file://") else os.path.expanduser(text)
    return Path(os.path.abspath(text))


def absolute(path: PathLike) -> str:
    """`path` in a form that is valid in other processes; URIs are unchanged."""
    return os.fspath(path) if is_uri(path) else str(local_path(path))


def join(root: PathLike, *parts: str) -> str:
    """`root`/part/part, for paths and URIs; before the query of a URI."""
    if not is_uri(root):
        return os.path.join(root, *parts)
    stem, query = split_query(root)
    return "/".join([stem.rstrip("/"), *parts]) + query


def name_of(path: PathLike) -> str:
    """The last part of a path or URI: a run's name."""
    return split_query(path)[0].rstrip("/").rpartition("/")[2]


def without_credentials(path: PathLike) -> str:
    """`path` for messages: without the parts of a URI that can contain credentials."""
    return re.sub(r"://([^/@:]*:(?!\d+/)[^@]*|[^/@]*)@", "://", split_query(path)[0])  # a secret may contain a slash


def split_query(path: PathLike) -> tuple[str, str]:
    """A URI without its query, and the query with its question mark; a local path unchanged."""
    if not is_uri(path):
        return os.fspath(path), ""
    stem, mark, query = os.fspath(path).partition("?")
    return stem, mark + query
