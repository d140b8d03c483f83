"""Sources -> checks -> tokens: everything that a run needs to plan its batches."""

from __future__ import annotations

import hashlib
import importlib.resources
import json
from collections.abc import Collection, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow.parquet as pq

from ofmu_ray import progress
from ofmu_ray.cluster.map_tasks import running_ray
from ofmu_ray.config import SourceConfig
from ofmu_ray.data import row_checks as checks
from ofmu_ray.data import sources
from ofmu_ray.data.encoder import Encoder, stream_encoder
from ofmu_ray.data.repeats import digests_of, find_matches
from ofmu_ray.data.row_checks import DataReport, OverlapReport, Policy, Problems, StreamReport
from ofmu_ray.data.stored_stream import StoredStream, TokenisedStream
from ofmu_ray.data.template import Template
from ofmu_ray.data.tokenise import Part, PartJob, encode_fragment, read_part, take_rows
from ofmu_ray.errors import UserError
from ofmu_ray.storage import (
    absolute,
    is_file,
    join,
    locate,
    published,
    read_text,
    write_text,
)

MARKER = "stream.json"
_CODE = ("sources.py", "content.py", "row_files.py", "row_checks.py", "encoder.py", "tokenise.py")
_BLOCK = 2**20


@dataclass(frozen=True)
class PreparedData:
    """Encoded streams by name, their report, and their encoder."""

    streams: dict[str, TokenisedStream]
    report: DataReport
    encoder: Encoder
    sources: Mapping[str, str] = field(default_factory=dict)
    """Digest of each source's content (`sources.fingerprint`), by stream."""

    @property
    def template(self) -> Template:
        """The layout of texts. Only language models have one."""
        template = getattr(self.encoder, "template", None)
        assert isinstance(template, Template), "these rows are not texts"
        return template


def write_sample(stream: TokenisedStream, count: int, path: str) -> str:
    """Write `count` used rows, evenly spread, to a Parquet file (row_id and payload); returns `path`."""
    table = take_rows(stream.folder, [part for part, _ in stream.parts], stream.spread(count))
    filesystem, inside = locate(path)
    filesystem.create_dir(inside.rpartition("/")[0], recursive=True)
    pq.write_table(table, inside, filesystem=filesystem)
    return path


def largest_tokens(streams: Mapping[str, TokenisedStream]) -> dict[str, int]:
    """The largest token number in the files of each stream of texts, as their footers have it: no row is read."""
    found: dict[str, int] = {}
    for name, stream in streams.items():
        for part, _ in stream.parts:
            filesystem, inside = locate(join(stream.folder, part))
            meta = pq.read_metadata(inside, filesystem=filesystem)
            for group in range(meta.num_row_groups):
                for column in map(meta.row_group(group).column, range(meta.num_columns)):
                    of_tokens = column.path_in_schema.partition(".")[0] == "input_ids"
                    if of_tokens and column.statistics is not None and column.statistics.has_min_max:
                        found[name] = max(found.get(name, 0), column.statistics.max)
    return found


def prepare_streams(
    sources: Mapping[str, SourceConfig],
    root: str | None,
    encoder: Encoder,
    storage: str,
    *,
    private: Mapping[str, str] | None = None,
    overlap: Policy = "error",
    duplicates: Policy = "allow",
    whole: Collection[str] = (),
    salted: Collection[str] = (),
) -> PreparedData:
    """Check and encode every source (option `data.<name>`), or reuse the result of an earlier run.

    Tokens go to `<storage>/cache/data/<hash of content, encoder and this code>/`, where other runs can reuse them.
    Tokens of the streams in `private` go to the given folder, under the same hash: a run whose data must not outlive it
    deletes its own folder and nobody else's tokens. The work runs on Ray if it is up, else in this process. Overlap is
    that of the streams `forget` and `retain`, if both are given. Rows of the streams in `whole` must not be truncated.
    Of the streams in `salted`, whose files have a secret in them, the report has the digest of the files, not that of
    the rows, from which these could be guessed.

    Raises UserError with all problems of all sources in one message.
    """
    pieces = {name: _fragments(name, source, root) for name, source in sources.items()}
    keys = {name: _key(name, fragments, stream_encoder(encoder, name)) for name, fragments in pieces.items()}
    shared = join(absolute(storage), "cache", "data")
    folders = {name: join(absolute((private or {}).get(name, shared)), key) for name, key in keys.items()}
    with ExitStack() as stack:
        places = dict(folders)
        todo = [name for name, folder in folders.items() if not is_file(join(folder, MARKER))]
        for name in todo:
            places[name] = stack.enter_context(published(folders[name], MARKER))
        problems = _tokenise({name: pieces[name] for name in todo}, places, encoder)
        stored = {name: StoredStream(name, place, tuple(_parts(place))) for name, place in places.items()}
        shown = {name: source.shown for name, source in sources.items()}
        overlaps = _Overlaps(shown, stored, overlap, duplicates)
        overlaps.refuse(problems, whole)
        report = DataReport(
            streams={name: overlaps.report(name) for name in sources},
            overlap=overlaps.overlap,
            tokenizer_sha256=encoder.fingerprint(),
        )
    streams = {name: _stream(name, folders[name], keys[name], overlaps) for name in sources}
    contents = _contents(pieces)
    shown_as = {
        name: replace(one, sha256=contents[name]) if name in salted else one for name, one in report.streams.items()
    }
    return PreparedData(streams, replace(report, streams=shown_as), encoder, contents)


def _fragments(name: str, source: SourceConfig, root: str | None) -> list[sources.Fragment]:
    return sources.fragments(source, root, stream=name, option=f"data.{name}")


def _contents(pieces: Mapping[str, list[sources.Fragment]]) -> dict[str, str]:
    return {name: sources.fingerprint(fragments) for name, fragments in pieces.items()}


def source_contents(named: Mapping[str, SourceConfig], root: str | None) -> dict[str, str]:
    """`PreparedData.sources` of the sources as they are now, of those that can be read."""
    found = {}
    for name, source in named.items():
        with suppress(UserError):
            found[name] = sources.fingerprint(_fragments(name, source, root))
    return found


def _key(name: str, pieces: list[sources.Fragment], encoder: Encoder) -> str:
    code = [importlib.resources.files("ofmu_ray.data").joinpath(file).read_text() for file in _CODE]
    text = json.dumps([name, sources.fingerprint(pieces), encoder.fingerprint(), code])
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _tokenise(
    todo: Mapping[str, list[sources.Fragment]], places: Mapping[str, str], encoder: Encoder
) -> dict[str, Problems]:
    """Write the parts and the marker of each stream; problems by stream."""
    if not todo:
        return {}
    items = [
        PartJob(piece, join(places[name], f"part-{index:06d}.parquet"))
        for name, pieces in todo.items()
        for index, piece in enumerate(pieces)
    ]
    done: list[Part] = _encoded(items, encoder)
    problems: dict[str, Problems] = {}
    for name in todo:
        mine = [part for part in done if part.stream == name]
        problems[name] = Problems()
        for part in mine:
            problems[name].merge(part.problems)
        problems[name].empty = not sum(part.rows_read for part in mine)
        content = {"parts": [[part.name, part.rows] for part in mine]}
        write_text(join(places[name], MARKER), json.dumps(content))
    return problems


def _encoded(items: list[PartJob], encoder: Encoder) -> list[Part]:
    if running_ray() is not None:
        from ofmu_ray.data.ray_data import run_tasks

        return run_tasks(encode_fragment, items, encoder, "tokenising")
    with progress.bar("tokenising", len(items), "part") as bar:
        done = []
        for item in items:
            done.append(encode_fragment(item, encoder))
            bar.update()
        return done


def _parts(folder: str) -> list[tuple[str, int]]:
    content = json.loads(read_text(join(folder, MARKER)))
    return [(str(name), int(rows)) for name, rows in content["parts"]]


def _stream(name: str, folder: str, key: str, overlaps: _Overlaps) -> TokenisedStream:
    parts, scan = overlaps.stored[name].parts, overlaps.scans[name]
    stream = TokenisedStream(name, folder, parts, overlaps.dropped[name], scan.tokens, scan.longest, "")
    digest = hashlib.sha256()
    for start in range(0, stream.used_rows, _BLOCK):
        rows = stream.rows_at(np.arange(start, min(start + _BLOCK, stream.used_rows)))
        digest.update(rows.astype(np.int64).tobytes())
    return replace(stream, fingerprint=hashlib.sha256(f"{key}{digest.hexdigest()}".encode()).hexdigest())


@dataclass
class _Scan:
    """What reading a stream's bookkeeping part by part leaves."""

    sha256: str = ""
    """Digest of all normalised digests."""
    tokens: int = 0
    """Of used rows, as the next three."""
    longest: int = 0
    prompt_tokens: int = 0
    cut_rows: int = 0
    lost: int = 0
    """Tokens beyond max_length of all rows."""
    long: list[int] = field(default_factory=list)
    """The first few rows that lost some, used or not."""
    all_long: int = 0


def _scan(stream: StoredStream, dropped: np.ndarray) -> _Scan:
    scan, digest, first = _Scan(), hashlib.sha256(), 0
    for name, rows in stream.parts:
        table = read_part(stream.folder, name, ["length", "cut", "normalised", "prompt_tokens"])
        low, high = np.searchsorted(dropped, [first, first + rows])
        mine = np.ones(rows, dtype=bool)
        mine[dropped[low:high] - first] = False
        lengths, cut = table["length"].to_numpy()[mine], table["cut"].to_numpy()
        scan.tokens += int(lengths.sum(dtype=np.int64))
        scan.longest = max(scan.longest, int(lengths.max(initial=0)))
        digest.update(digests_of(table["normalised"])[1].tobytes())
        if "prompt_tokens" in table.column_names:
            scan.prompt_tokens += int(table["prompt_tokens"].to_numpy()[mine].sum(dtype=np.int64))
        long = np.flatnonzero(cut)
        scan.cut_rows += int((cut[mine] > 0).sum())
        scan.all_long += len(long)
        scan.lost += int(cut.sum(dtype=np.int64))
        scan.long += (first + long[: checks.SHOWN - len(scan.long)]).tolist()
        first += rows
    scan.sha256 = digest.hexdigest()
    return scan


class _Overlaps:
    """Duplicates and overlap of tokenised streams, and the remaining rows."""

    def __init__(
        self, shown: dict[str, str], stored: dict[str, StoredStream], overlap: Policy, duplicates: Policy
    ) -> None:
        self.shown, self.stored = shown, stored
        self.policies = overlap, duplicates
        self.matches = find_matches(list(stored.values()))
        none = np.empty(0, dtype=np.int64)
        self.dropped = {
            name: found.normalised if duplicates == "drop" else none for name, found in self.matches.items()
        }
        self.overlap: OverlapReport | None = None
        if {"forget", "retain"} <= stored.keys():
            shared = self.matches["retain"].shared
            exact = len(self.matches["retain"].shared_exact)
            some = self._ids("retain", shared[: checks.SHOWN])
            self.overlap = OverlapReport(exact=exact, normalised=len(shared), row_ids=some)
            if overlap == "drop":
                self.dropped["retain"] = np.union1d(self.dropped["retain"], shared)
        self.scans = {name: _scan(stream, self.dropped[name]) for name, stream in stored.items()}

    def refuse(self, problems: dict[str, Problems], whole: Collection[str]) -> None:
        """Raise one UserError with all problems, if there are any."""
        overlap, duplicates = self.policies
        extra = []
        for name in sorted(self.stored.keys() & set(whole)):
            scan = self.scans[name]
            if scan.all_long:
                ids = self._ids(name, np.array(scan.long, dtype=np.int64))
                extra.append(checks.long_line(name, ids, scan.all_long, scan.lost))
        if duplicates == "error":
            for name, found in self.matches.items():
                if count := len(found.normalised):
                    ids = self._ids(name, found.normalised[: checks.SHOWN])
                    extra.append(checks.duplicate_line(f"data.{name}", ids, count))
        if overlap == "error" and self.overlap and self.overlap.normalised:
            extra.append(checks.overlap_line(self.overlap))
        checks.refuse({f"data.{name}": (self.shown[name], p) for name, p in problems.items()}, extra)
        for name, stream in self.stored.items():
            if not stream.rows:
                raise UserError(f"data.{name}: every row is shorter than data.format.min_characters; lower it")
            if len(self.dropped[name]) == stream.rows:
                raise UserError(f"data.{name}: no row is left after dropping duplicates and overlap")

    def report(self, name: str) -> StreamReport:
        scan, dropped, found = self.scans[name], self.dropped[name], self.matches[name]
        rows = self.stored[name].rows
        return StreamReport(
            source=self.shown[name],
            rows=rows,
            used_rows=rows - len(dropped),
            tokens=scan.tokens,
            label_tokens=scan.tokens - scan.prompt_tokens,
            truncated_rows=scan.cut_rows,
            longest=scan.longest,
            exact_duplicates=len(found.exact),
            normalised_duplicates=len(found.normalised),
            dropped=len(dropped),
            dropped_ids=self._ids(name, dropped[:1000]),
            sha256=scan.sha256,
        )

    def _ids(self, name: str, rows: np.ndarray) -> list[str]:
        if not len(rows):
            return []
        stream = self.stored[name]
        ids: list[str] = take_rows(stream.folder, [part for part, _ in stream.parts], rows, ["row_id"])[
            "row_id"
        ].to_pylist()
        return ids
