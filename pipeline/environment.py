"""The environment variables that Dubito reads: what each is called and what it means. They are read in this file alone.

Of Dubito itself; none has to be set:

- ``DUBITO_STORAGE_PATIENCE_S``: seconds for which a failing call to a remote store is made again (default 120).
- ``DUBITO_LOG``: ``json`` makes each line of a job's output a JSON object; anything else leaves text for a person.
- ``DUBITO_RUN``: id of the run, for log lines and metrics. A submitted job gets its submission id; without the variable
  it is the name of the job's log.
- ``DUBITO_GROWS``: what a cluster with an autoscaler may have at most, such as ``CPU=64,GPU=4``; set where the cluster
  is set up, absent where it does not grow.
- ``DUBITO_PINS``: JSON object ``{package: version}`` that a submitted job was written against; the submission sets it.
- ``DUBITO_REGISTRY``: URI of the registry, where ``dubito registry`` is given none.

Every variable that begins with ``DUBITO_`` travels with a submitted job.

Of others, read by Dubito:

- ``RAY_ADDRESS``: the Ray cluster that a job joins; without it Ray is started on this machine.
- ``RAY_API_SERVER_ADDRESS``: the cluster's dashboard, where ``dubito jobs`` is given none.
- ``AWS_ENDPOINT_URL_S3``, else ``AWS_ENDPOINT_URL``; ``AWS_REGION``, else ``AWS_DEFAULT_REGION``: where ``s3://`` is.
- ``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``, ``AWS_SESSION_TOKEN``: who asks. Never printed, stored or submitted.

Ray, its dashboard's token (``RAY_AUTH_*``), botocore and MLflow read further ones by themselves.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from pipeline.errors import InputError

STORAGE_PATIENCE_S = "DUBITO_STORAGE_PATIENCE_S"
LOG_FORMAT = "DUBITO_LOG"
RUN_ID = "DUBITO_RUN"
CLUSTER_LIMITS = "DUBITO_GROWS"
PINNED_VERSIONS = "DUBITO_PINS"
REGISTRY = "DUBITO_REGISTRY"
RAY_ADDRESS = "RAY_ADDRESS"
DASHBOARD_ADDRESS = "RAY_API_SERVER_ADDRESS"
JSON_LOG = "json"
"""The value of ``DUBITO_LOG`` that asks for JSON lines."""

_PREFIX = "DUBITO_"


@dataclass(frozen=True)
class S3Access:
    """Where ``s3://`` is and who asks, as the AWS variables say; None for what they do not say."""

    endpoint: str | None
    region: str | None
    key: str | None = field(repr=False)
    secret: str | None = field(repr=False)
    token: str | None = field(repr=False)


def storage_patience_s(default: float) -> float:
    """Seconds for which a failing call to a remote store is made again.

    Raises:
        InputError: The variable is no number.
    """
    text = os.environ.get(STORAGE_PATIENCE_S)
    if not text:
        return default
    try:
        return float(text)
    except ValueError:
        raise InputError(f"{STORAGE_PATIENCE_S} = '{text}': wanted seconds, such as 120; mend it or unset it") from None


def wants_json_log() -> bool:
    """Whether a job's output shall be JSON lines."""
    return os.environ.get(LOG_FORMAT) == JSON_LOG


def run_id() -> str | None:
    """Id of the run, where somebody chose one."""
    return os.environ.get(RUN_ID) or None


def cluster_limits() -> dict[str, float]:
    """Resource -> what a cluster that grows may have of it at most; empty where it does not grow.

    Raises:
        InputError: The variable cannot be read.
    """
    text = os.environ.get(CLUSTER_LIMITS, "")
    pairs = (entry.split("=") for entry in text.split(",") if entry)
    try:
        return {resource.strip(): float(limit) for resource, limit in pairs}
    except ValueError:
        raise InputError(
            f"{CLUSTER_LIMITS} = '{text}': wanted what the cluster may have at most, such as CPU=64,GPU=4; mend it "
            "where the cluster is set up, or take it away"
        ) from None


def pinned_versions() -> dict[str, str]:
    """Package -> version that this job was submitted with; empty where it was not submitted, or with any versions.

    Raises:
        InputError: The variable is no JSON object of strings.
    """
    text = os.environ.get(PINNED_VERSIONS)
    if not text:
        return {}
    try:
        versions = json.loads(text)
    except ValueError:
        versions = None
    if not isinstance(versions, dict) or not all(isinstance(version, str) for version in versions.values()):
        raise InputError(f'{PINNED_VERSIONS} = \'{text}\': wanted JSON such as {{"torch": "2.11.0"}}; unset it')
    return versions


def has_ray_address() -> bool:
    """Whether there is a Ray cluster to join; Ray itself reads its address."""
    return bool(os.environ.get(RAY_ADDRESS))


def s3_access() -> S3Access:
    """Endpoint, region and credentials of ``s3://``."""
    return S3Access(
        endpoint=os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"),
        region=os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"),
        key=os.environ.get("AWS_ACCESS_KEY_ID"),
        secret=os.environ.get("AWS_SECRET_ACCESS_KEY"),
        token=os.environ.get("AWS_SESSION_TOKEN"),
    )


def travelling() -> dict[str, str]:
    """The variables that a submitted job takes along: Dubito's own, and so never a credential."""
    return {name: value for name, value in os.environ.items() if name.startswith(_PREFIX)}


def set_defaults(variables: Mapping[str, str]) -> None:
    """Set variables of this process and its children, where they are not set: the one place that writes any."""
    for name, value in variables.items():
        os.environ.setdefault(name, value)
