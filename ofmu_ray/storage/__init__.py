"""Where files lie and how they appear: local paths and URIs (s3://, gs://), whole or not at all.

| module | what it holds |
|---|---|
| names | paths and URIs as text |
| places | a file or folder at either: read, write, remove, publish |
| local | files and folders that move into their place on a disk |
| scratch | folders for a while, which a kill does not leave behind for ever |
| folders | folders with a manifest: written and read back, fetched and checked; files to memory-map |
| manifest | sizes and SHA-256 |
| patient | S3 that is asked again |
| trouble | what a disk or a store refuses, as a sentence |

pyarrow is imported where it is used, so that importing this package stays cheap.
"""

from ofmu_ray.storage.folders import atomic_dir, contents, drop_copies, fetched, is_whole, new_mapped, open_mapped
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
