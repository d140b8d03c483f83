"""Atomic storage of files and folders at local paths and URIs (s3://, gs://).

| module | content |
|---|---|
| names | paths and URIs as text |
| places | files and folders at either: read, write, remove, publish |
| local | atomic files and folders on a local disk |
| scratch | temporary folders, removed even after a kill |
| folders | folders with a manifest: written and verified, fetched and checked; files to memory-map |
| manifest | sizes and SHA-256 |
| patient | S3 with more retries |
| bucket_lock | a lock in a store that has none |
| owners | names of processes that hold something |
| trouble | errors of disks and stores, as a sentence |

pyarrow is imported where it is used, to keep the import of this package cheap.
"""

from ofmu_ray.storage.folders import (
    NewFolder,
    atomic_dir,
    contents,
    drop_copies,
    fetched,
    is_whole,
    new_folder,
    new_mapped,
    open_mapped,
)
from ofmu_ray.storage.names import PathLike, absolute, is_uri, join, local_path, name_of, without_credentials
from ofmu_ray.storage.places import (
    atomic_write,
    is_file,
    local_file,
    locate,
    published,
    read_text,
    remove_file,
    remove_folder,
    write_text,
)
from ofmu_ray.storage.scratch import scratch
from ofmu_ray.storage.trouble import explained

__all__ = [
    "NewFolder",
    "PathLike",
    "absolute",
    "atomic_dir",
    "atomic_write",
    "contents",
    "drop_copies",
    "explained",
    "fetched",
    "is_file",
    "is_uri",
    "is_whole",
    "join",
    "local_file",
    "local_path",
    "locate",
    "name_of",
    "new_folder",
    "new_mapped",
    "open_mapped",
    "published",
    "read_text",
    "remove_file",
    "remove_folder",
    "scratch",
    "without_credentials",
    "write_text",
]
