"""Object storage and local disks behind one set of functions; what they commit is atomic and checked.

filesystem: URI -> filesystem; list, read, write, and ``create_once``, the one commit primitive
retry: calls to a store that fails for a while are made again
checksum: a sha256 inside a JSON document, over all the rest of it
lease: a lock that expires, for runs that must not overlap
"""

from pipeline.storage.filesystem import (
    SCHEMES,
    Listed,
    absolute,
    arrow,
    create_once,
    error_status,
    exists,
    generic,
    join,
    list_files,
    make_folder,
    names_in,
    open_input,
    publish,
    read_bytes,
    read_text,
    scheme_of,
    with_retries,
    write_bytes,
)

__all__ = [
    "SCHEMES",
    "Listed",
    "absolute",
    "arrow",
    "error_status",
    "create_once",
    "exists",
    "generic",
    "join",
    "list_files",
    "make_folder",
    "names_in",
    "open_input",
    "with_retries",
    "publish",
    "read_bytes",
    "read_text",
    "scheme_of",
    "write_bytes",
]
