"""A sha256 inside a JSON document, and files against the sha256 that a document names for them.

A JSON document carries a digest over all the rest of it, so what commits a result also says when it was damaged;
other files are read against the sha256 that a document names.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from pipeline.errors import InputError
from pipeline.storage import filesystem

DIGEST = "digest"


def with_checksum(content: Mapping[str, Any]) -> dict[str, Any]:
    """``content`` with a ``digest``: sha256 of the sorted compact JSON of everything else."""
    without_digest = {key: value for key, value in content.items() if key != DIGEST}
    text = json.dumps(without_digest, sort_keys=True, separators=(",", ":"))
    # Through JSON once: what is read back (lists for tuples, strings for keys) must give the same text.
    text = json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"))
    return {**without_digest, DIGEST: hashlib.sha256(text.encode()).hexdigest()}


def verify_checksum(content: Any, where: str, remedy: str) -> None:
    """Check that a JSON document still has the digest that it was committed with.

    Args:
        content: The parsed JSON.
        where: Its URI.
        remedy: What to do, for the error: "ingest again".

    Raises:
        InputError: The digest differs, or the document has none.
    """
    if not isinstance(content, dict) or content.get(DIGEST) != with_checksum(content)[DIGEST]:
        raise InputError(f"'{where}' is not as it was committed (its digest differs): damaged or edited; {remedy}")


def read_verified(uri: str, sha256: str, remedy: str) -> bytes:
    """The bytes of a file, if they are those that were written.

    Args:
        uri: The file.
        sha256: Hexadecimal digest of what was written, from the document that names the file.
        remedy: What to do, for the error: "ingest again".

    Raises:
        InputError: The file cannot be read, or its bytes differ from those that were written.
    """
    try:
        data = filesystem.read_bytes(uri)
    except OSError as error:
        raise InputError(f"'{uri}' could not be read ({filesystem.error_status(error)}); {remedy}") from None
    if hashlib.sha256(data).hexdigest() != sha256:
        raise InputError(f"'{uri}' is not what was written (sha256 differs, {len(data)} bytes were read); {remedy}")
    return data
