"""URI -> filesystem: list, read, write aside then publish, create_once.

``s3://`` takes endpoint, region and credentials from the usual AWS variables (see ``pipeline.environment``); they are
never printed or stored. Bulk data goes through pyarrow, single small objects through fsspec (pyarrow has no
conditional PUT). Calls to a remote store that fail for a while are made again (see ``retry``).
"""

import contextlib
import errno
import os
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import fsspec
import pyarrow as pa
from pyarrow import fs as pafs

from pipeline.environment import S3Access, s3_access
from pipeline.errors import InputError, nearest, one_line
from pipeline.storage import retry
from pipeline.storage.retry import error_status as error_status

T = TypeVar("T")
SCHEMES = ("file", "s3", "gs", "memory")
DEFAULT_REGION = "us-east-1"
"""Region of an S3 store whose variables name none."""


@dataclass(frozen=True)
class Listed:
    """One file below a folder."""

    path: str
    """Relative to that folder, with '/' between its parts."""
    size: int
    """Bytes."""


def absolute(uri: str) -> str:
    """A URI that means the same in every process: a plain path becomes an absolute one, no trailing '/'.

    What follows ``file://`` is taken as it stands, like an s3 key: names may hold '%' and '#'.
    """
    if "://" not in uri:
        return str(Path(uri).expanduser().resolve())
    scheme = scheme_of(uri)
    if scheme == "file":
        path = uri.removeprefix("file://")
        if not path.startswith("/"):
            raise InputError(f"'{uri}': wanted file:///absolute/path, or a plain path")
        return str(Path(path).resolve())
    return uri.rstrip("/")


def scheme_of(uri: str) -> str:
    """``file`` for a plain path, else the part before '://'; an unknown one is an InputError."""
    scheme = uri.split("://", 1)[0] if "://" in uri else "file"
    if scheme not in SCHEMES:
        raise InputError(f"'{uri}': unknown scheme '{scheme}://'.{nearest(scheme, SCHEMES)}")
    return scheme


def join(uri: str, *parts: str) -> str:
    """Append path segments to a URI."""
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])


@lru_cache(maxsize=16)
def _arrow_s3(access: S3Access) -> pafs.FileSystem:
    """Arrow's client of S3; one for each endpoint and credentials, since its connections are worth keeping."""
    options: dict[str, Any] = {"connect_timeout": 10, "request_timeout": 20}  # of silence, not of a whole transfer
    if access.endpoint:
        endpoint = urlsplit(access.endpoint if "://" in access.endpoint else f"https://{access.endpoint}")
        options |= {"endpoint_override": endpoint.netloc, "scheme": endpoint.scheme}
        options["region"] = access.region or DEFAULT_REGION
    elif access.region:
        options["region"] = access.region
    if access.key and access.secret:
        options |= {"access_key": access.key, "secret_key": access.secret, "session_token": access.token}
    return pafs.S3FileSystem(allow_delayed_open=True, **options)


def arrow(uri: str) -> tuple[pafs.FileSystem, str]:
    """(pyarrow filesystem, path inside it), for bulk data."""
    uri = absolute(uri)
    scheme = scheme_of(uri)
    if scheme == "file":
        return pafs.LocalFileSystem(), uri
    if scheme == "s3":
        return _arrow_s3(s3_access()), uri.removeprefix("s3://")
    filesystem, path = generic(uri)
    return pafs.PyFileSystem(pafs.FSSpecHandler(filesystem)), path


def generic(uri: str) -> tuple[Any, str]:
    """(fsspec filesystem, path inside it), for single objects and for create_once."""
    uri = absolute(uri)
    scheme = scheme_of(uri)
    if scheme == "file":
        return fsspec.filesystem("file"), uri
    if scheme == "s3":
        access = s3_access()
        client_options = {"region_name": access.region or DEFAULT_REGION}
        credentials = {"key": access.key, "secret": access.secret, "token": access.token} if access.key else {}
        filesystem = fsspec.filesystem(
            "s3",
            endpoint_url=access.endpoint,
            client_kwargs=client_options,
            use_listings_cache=False,
            **credentials,
        )
        return filesystem, uri.removeprefix("s3://")
    try:
        return fsspec.core.url_to_fs(uri)
    except ImportError as error:
        raise InputError(f"'{uri}': {error}; install the package that it names") from None


def _not_found(uri: str, what: str) -> InputError:
    return InputError(f"{what} '{uri}' not found; check the path" + _where_to_look(uri))


def _where_to_look(uri: str) -> str:
    """The end of an error's sentence: what else may be wrong with a place that is not on this machine."""
    return ", the endpoint (AWS_ENDPOINT_URL) and the credentials" if scheme_of(uri) == "s3" else ""


def list_files(uri: str, suffixes: tuple[str, ...] = ()) -> list[Listed]:
    """All files below a folder, sorted by path; hidden ones (name begins with '.') are left out.

    Args:
        uri: A folder.
        suffixes: Lower-case endings of the files to list, such as ``(".jpg",)``; empty lists all.

    Raises:
        InputError: There is no such folder, or it may not be read.
    """
    filesystem, root = arrow(uri)
    try:
        kind = with_retries(uri, lambda: filesystem.get_file_info(root).type)
        if kind == pafs.FileType.NotFound:
            raise _not_found(uri, "folder")
        if kind == pafs.FileType.File:
            raise InputError(f"'{uri}' is a file; wanted a folder")
        infos = with_retries(uri, lambda: filesystem.get_file_info(pafs.FileSelector(root, recursive=True)))
    except OSError as error:
        raise InputError(f"folder '{uri}' could not be listed: {one_line(error)}{_where_to_look(uri)}") from None
    # Arrow gives paths from the filesystem's root; callers join them to the folder that they asked for.
    base = root.rstrip("/") + "/"
    files = [
        Listed(info.path.removeprefix(base), int(info.size))
        for info in infos
        if info.type == pafs.FileType.File and not info.base_name.startswith(".")
    ]
    kept = [row for row in files if not suffixes or row.path.lower().endswith(suffixes)]
    return sorted(kept, key=lambda row: row.path)


def names_in(uri: str, *, folders: bool = False) -> list[str]:
    """Names of the files (or ``folders``) directly in a folder, sorted; none where there is no such folder."""
    filesystem, root = arrow(uri)
    infos = with_retries(uri, lambda: filesystem.get_file_info(pafs.FileSelector(root, allow_not_found=True)))
    kind = pafs.FileType.Directory if folders else pafs.FileType.File
    # What ends in .part is another process's file that is not published yet.
    return sorted(info.base_name for info in infos if info.type == kind and not info.base_name.endswith(".part"))


def with_retries(uri: str, call: Callable[[], T]) -> T:
    """``call()``, which touches ``uri``; made again while a remote store hiccups or does not answer at all."""
    if scheme_of(uri) in ("file", "memory"):
        return call()
    return retry.retry_call(call, f"'{uri}'")


def read_bytes(uri: str, max_bytes: int | None = None) -> bytes:
    """The whole object; of a larger one the first ``most`` bytes.

    Raises:
        FileNotFoundError, PermissionError, OSError: As the filesystem says; ``error_status`` tells them apart.
    """
    filesystem, path = arrow(uri)

    def read() -> bytes:
        with filesystem.open_input_stream(path) as stream:
            return stream.read() if max_bytes is None else stream.read(max_bytes)

    return with_retries(uri, read)


def read_text(uri: str, what: str) -> str:
    """The object as UTF-8 text; missing is an InputError that calls it ``what``."""
    try:
        return read_bytes(uri).decode("utf-8")
    except FileNotFoundError:
        raise _not_found(uri, what) from None
    except UnicodeDecodeError:
        raise InputError(f"{what} '{uri}' is not UTF-8 text") from None
    except OSError as error:
        raise InputError(f"{what} '{uri}' could not be read: {one_line(error)}{_where_to_look(uri)}") from None


def exists(uri: str) -> bool:
    """Whether there is a file or folder at ``uri``."""
    filesystem, path = arrow(uri)
    return with_retries(uri, lambda: filesystem.get_file_info(path).type) != pafs.FileType.NotFound


@contextlib.contextmanager
def publish(uri: str) -> Iterator[Any]:
    """A binary stream whose content appears at ``uri`` only when the block ends without an error.

    Local files are written beside and renamed; an object store shows an object only once it is complete.
    """
    filesystem, path = arrow(uri)
    if scheme_of(absolute(uri)) != "file":
        # Arrow's S3 stream publishes what it has when it is garbage-collected, so nothing is opened early.
        buffer = pa.BufferOutputStream()
        yield buffer
        content = buffer.getvalue()

        def upload() -> None:
            with filesystem.open_output_stream(path) as stream:
                stream.write(content)

        with_retries(uri, upload)
        return
    # A name of its own, in the same folder: a rename is atomic only within one filesystem.
    temporary = Path(f"{path}.{secrets.token_hex(4)}.part")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        with filesystem.open_output_stream(str(temporary)) as stream:
            yield stream
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(uri: str, data: bytes) -> None:
    """Write aside, then publish: readers see the old content or the new, never a part."""
    with publish(uri) as stream:
        stream.write(data)


def make_folder(uri: str) -> None:
    """Create a local folder with its parents; object stores need none."""
    if scheme_of(absolute(uri)) == "file":
        Path(absolute(uri)).mkdir(parents=True, exist_ok=True)


def create_once(uri: str, data: bytes) -> bool:
    """Commit ``data`` at ``uri`` if nothing is there yet: the one commit primitive.

    Local: a temporary file is linked into place. s3: PUT with If-None-Match. gs: generation match.
    A lost answer is read back and compared, since it may have been ours.

    Returns:
        True if ``uri`` now holds this call's ``data``, False if something else was there first.

    Raises:
        InputError: The scheme has no atomic creation.
    """
    uri = absolute(uri)
    scheme = scheme_of(uri)
    if scheme == "file":
        return _create_local(Path(uri), data)
    if scheme not in ("s3", "gs"):
        raise InputError(f"'{uri}': {scheme}:// cannot commit atomically; use file, s3 or gs")
    filesystem, path = generic(uri)

    def create() -> bool:
        try:
            filesystem.pipe_file(path, data, mode="create")
            return True
        except Exception as error:
            # Refused because an object is there, or the answer was lost after ours was written: the content decides.
            try:
                return read_bytes(uri) == data
            except FileNotFoundError:
                # Nothing was written. A PermissionError is never tried again, an OSError is while there is patience.
                kind = OSError if retry.is_transient(error) else PermissionError
                raise kind(f"'{uri}' could not be committed: {one_line(OSError(str(error)))}") from error

    return with_retries(uri, create)


def _create_local(path: Path, data: bytes) -> bool:
    """``create_once`` on a local disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        # On the disk before it has its name: after a power cut a commit is whole, or it is not there.
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        # Unlike a rename, a link fails where the name is taken: of racing writers one wins.
        os.link(temporary, path)
        return True
    except FileExistsError:
        return path.read_bytes() == data
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK):
            raise
        raise InputError(f"'{path}': this filesystem has no hard links, which a commit needs") from None
    finally:
        temporary.unlink(missing_ok=True)


def open_input(uri: str) -> pa.NativeFile:
    """A random-access file, for Parquet readers."""
    filesystem, path = arrow(uri)
    return filesystem.open_input_file(path)
