"""``--submit ADDRESS``: the same command as a Ray job on a cluster: connected to, sent once, followed."""

import json
import re
import secrets
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.session import RAY_DEFAULTS, run_job
from jobs.submission import pinned_versions, working_tree
from jobs.submission.follow import follow_job, jobs_command_line
from jobs.submission.request import Request, request_of
from pipeline import environment
from pipeline.errors import InputError, one_line
from pipeline.runtime.progress import JobOutput

_JOB_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
_COMMAND_KEY = "dubito_command"
"""Of the job's metadata: its command, by which a job of the same name is known to be the same."""
_TREE_KEY = "dubito_tree"
"""Of the job's metadata: sha256 of the working tree's zip."""


@dataclass(frozen=True)
class Cluster:
    """What ``--submit`` and the options beside it say."""

    address: str
    """Of the cluster's dashboard."""
    job: str = ""
    """Submission id: the same one twice is one run; '' for a new one."""
    environment: str = "check"
    """``check``: refuse other versions than those pinned; ``install``: let Ray install them; ``any``."""
    driver_cpus: float = 0.0
    """CPUs that the job's own process reserves; 0: it runs on the head."""
    detach: bool = False
    """Do not follow the job."""


def submit_command(command: Any, options: dict[str, Any], submit: str, **cluster: Any) -> int:
    """Run a command of the command line on the cluster at ``submit``; returns the exit code.

    Args:
        command: The command as Typer built it; its parameters say which options are places.
        options: Values of its parameters, by name.
        submit: Address of the cluster's dashboard.
        **cluster: The other fields of ``Cluster``.
    """
    return run(command.name, lambda: request_of(command, options), Cluster(submit, **cluster))


def run(verb: str, make_request: Callable[[], Request], cluster: Cluster) -> int:
    """Submit a request and follow its job; returns the job's exit code (0 when detached).

    Args:
        verb: For messages and the log.
        make_request: Called inside the job's story, so that what it refuses is shown as every job shows it.
        cluster: Where to, and how.
    """

    def story(terminal: JobOutput) -> int:
        request = make_request()
        client = connect(cluster.address)
        name = cluster.job or f"{request.verb}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
        if not _JOB_NAME.match(name):
            raise InputError(f"--job '{name}': wanted letters, digits, '.', '_' and '-', at most 100")
        terminal.say(submit_request(client, name, request, cluster))
        if cluster.detach:
            terminal.say(f"follow it with: {jobs_command_line('follow', name, cluster.address)}")
            return 0
        return follow_job(client, name, cluster.address, terminal)

    return run_job(verb, story, on_this_machine=False)


def connect(address: str) -> Any:
    """A client of the cluster whose dashboard answers at ``address``.

    Raises:
        InputError: Nothing answers there, or the token is missing or wrong.
    """
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    if not address.startswith(("http://", "https://")):
        raise InputError(f"'{address}': wanted the address of a cluster's dashboard, such as http://localhost:8265")
    try:
        return JobSubmissionClient(address)
    except AuthenticationError:
        raise InputError(
            f"the cluster at {address} refused the token; set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to the "
            "file that holds the cluster's (or RAY_AUTH_TOKEN)"
        ) from None
    except (ConnectionError, RuntimeError, OSError) as error:
        reason = one_line(error)
        raise InputError(
            f"no Ray cluster answers at {address} ({reason}); check the address, and that its dashboard is "
            "forwarded to this machine"
        ) from None


def submit_request(client: Any, name: str, request: Request, cluster: Cluster) -> str:
    """Send the request, unless the cluster has a job of that name; returns a sentence on what was done.

    Raises:
        InputError: The job of that name is of another command, or failed; or the tree is too large.
    """
    existing = _describe_existing(client, name, request)
    if existing is not None:
        return existing
    with tempfile.TemporaryDirectory(prefix="dubito-submit-") as folder:
        package = Path(folder) / "tree.zip"
        digest = working_tree.pack(request.root, request.files, package)
        size = package.stat().st_size
        try:
            client.submit_job(
                entrypoint=request.entrypoint,
                submission_id=name,
                runtime_env=runtime_environment(request.root, name, package, cluster),
                metadata={_COMMAND_KEY: request.entrypoint, _TREE_KEY: digest},
                entrypoint_num_cpus=cluster.driver_cpus or None,
            )
        except RuntimeError as error:
            # Somebody may have sent the same job meanwhile: then it is there, and that is what was wanted.
            existing = _describe_existing(client, name, request)
            if existing is None:
                raise InputError(f"the cluster refused job {name}: {one_line(error)}") from None
            return existing
    return f"job {name} sent to {cluster.address} with {len(request.files)} files ({size / 1e6:.1f} MB)"


def _describe_existing(client: Any, name: str, request: Request) -> str | None:
    """A sentence on the cluster's job of that name; None if it has none.

    Raises:
        InputError: It is a job of another command, or has ended without success.
    """
    info = info_of(client, name)
    if info is None:
        return None
    existing_command = (info.metadata or {}).get(_COMMAND_KEY)
    if existing_command != request.entrypoint:
        raise InputError(
            f"job {name} is there already, of another command ({existing_command or 'not of dubito'}); "
            "choose another --job"
        )
    state = info.status.value
    if state in ("FAILED", "STOPPED"):
        raise InputError(f"job {name} was run already: {state}; choose another --job to run the command again")
    return f"job {name} is there already: {state}"


def info_of(client: Any, name: str) -> Any:
    """What the cluster knows of a job; None if it has none of that name."""
    try:
        return client.get_job_info(name)
    except RuntimeError as error:
        if "404" in str(error):
            return None
        raise


def runtime_environment(root: Path, name: str, package: Path, cluster: Cluster) -> dict[str, Any]:
    """Ray's runtime environment of the job: the tree, environment variables (never a credential), and versions.

    Args:
        root: The working tree, whose ``constraints.txt`` pins versions.
        name: Submission id, which is the id of the run.
        package: The tree's zip.
        cluster: Says what to do about versions.
    """
    variables = {
        **RAY_DEFAULTS,
        **environment.travelling(),
        environment.LOG_FORMAT: environment.JSON_LOG,
        environment.RUN_ID: name,
    }
    runtime: dict[str, Any] = {"working_dir": str(package)}
    versions = pinned_versions.versions_of(root)
    # The job itself checks its versions when it starts: Ray says nothing of other ones.
    if cluster.environment != "any":
        variables[environment.PINNED_VERSIONS] = json.dumps(versions)
    if cluster.environment == "install":
        packages = [f"{package_name}=={version}" for package_name, version in versions.items() if package_name != "ray"]
        options = ["--disable-pip-version-check"]
        if (root / pinned_versions.CONSTRAINTS).is_file():
            options += ["-c", f"${{RAY_RUNTIME_ENV_CREATE_WORKING_DIR}}/{pinned_versions.CONSTRAINTS}"]
        runtime["pip"] = {"packages": packages, "pip_check": False, "pip_install_options": options}
    return {**runtime, "env_vars": variables}
