"""``--submit ADDRESS``: the same command as a Ray job on a cluster, its output followed here."""

import asyncio
import contextlib
import json
import os
import re
import secrets
import shlex
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.session import RAY_DEFAULTS, run_job
from jobs.submission import pinned_versions, visible_paths, working_tree
from pipeline import environment
from pipeline.errors import InputError, one_line
from pipeline.runtime.json_log import JsonLogReplay
from pipeline.runtime.progress import JobOutput

AGAIN_S = 1.0
"""Between two attempts to follow a log whose connection was lost."""
PATIENCE_S = 120.0
"""A cluster that does not answer any more is asked for so long."""
INTERRUPTED = 130
_ID = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
_COMMAND, _TREE = "dubito_command", "dubito_tree"


@dataclass(frozen=True)
class Request:
    """One command as it is sent."""

    verb: str
    arguments: list[str]
    """After the verb, as the cluster will read them."""
    root: Path
    """The working tree that travels."""
    files: list[str]

    @property
    def entrypoint(self) -> str:
        """What the cluster runs, in the travelled tree."""
        return shlex.join(["python", "-m", "jobs.cli", self.verb, *self.arguments])


@dataclass(frozen=True)
class Cluster:
    """What ``--submit`` and the options beside it say."""

    address: str
    job: str = ""
    """Submission id: the same one twice is one run; '' for a new one."""
    environment: str = "check"
    """``check``: refuse other versions than those pinned; ``install``: let Ray install them; ``any``."""
    driver_cpus: float = 0.0
    """CPUs that the job's own process reserves; 0: it runs on the head."""
    detach: bool = False


def of_command(command: Any, options: dict[str, Any], submit: str, **cluster: Any) -> int:
    """Run a command of the command line on the cluster at ``submit``; returns the exit code.

    Args:
        command: As Typer built it; its parameters say which options are places.
        options: What was given, by parameter.
        submit: Address of the cluster's dashboard.
        **cluster: The other fields of ``Cluster``.
    """
    where = Cluster(submit, **cluster)
    return run(command.name, lambda: _request(command, options), where)


def _request(command: Any, options: dict[str, Any]) -> Request:
    """The command as the cluster will read it; places that it cannot see are refused."""
    root = working_tree.root_of(Path.cwd())
    files = working_tree.files(root)
    arguments: list[str] = []
    for parameter in command.params:
        value = options.get(parameter.name)
        if value is None or value == parameter.default or value in ("", [], ()):
            continue
        if parameter.metavar == "CONFIG.yaml":
            value = visible_paths.config(value, options.get("sets") or [], root, files)
        if parameter.param_type_name == "argument":
            arguments.append(str(value))
            continue
        flag = parameter.opts[0]
        if parameter.is_flag:
            arguments += [flag] if value else []
            continue
        for each in value if isinstance(value, (list, tuple)) else [value]:
            if parameter.metavar in ("URI", "FILE.json"):
                each = _seen_from_root(each, root)
                visible_paths.place(flag, each, files, written=parameter.name == "out")
            arguments += [flag, str(each)]
    return Request(command.name, arguments, root, files)


def _seen_from_root(place: str, root: Path) -> str:
    """A relative path below the tree's root as the job sees it, which begins there."""
    if not visible_paths.is_local(place):
        return place
    inside = os.path.relpath(Path(place).resolve(), root)
    return place if inside.startswith("..") else inside


def run(verb: str, make: Callable[[], Request], cluster: Cluster) -> int:
    """Submit what ``make`` gives, and follow; returns the job's exit code (0 when detached)."""

    def story(terminal: JobOutput) -> int:
        request = make()
        client = connect(cluster.address)
        name = cluster.job or f"{request.verb}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
        if not _ID.match(name):
            raise InputError(f"--job '{name}': wanted letters, digits, '.', '_' and '-', at most 100")
        terminal.say(submit(client, name, request, cluster))
        if cluster.detach:
            terminal.say(f"follow it with: {_again('follow', name, cluster.address)}")
            return 0
        return follow(client, name, cluster.address, terminal)

    return run_job(verb, story, here=False)


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


def submit(client: Any, name: str, request: Request, cluster: Cluster) -> str:
    """Send the command, unless the cluster has a job of that name; a sentence on what was done.

    Raises:
        InputError: The job of that name is of another command, or failed; or the tree is too large.
    """
    known = _known(client, name, request)
    if known is not None:
        return known
    with tempfile.TemporaryDirectory(prefix="dubito-submit-") as folder:
        package = Path(folder) / "tree.zip"
        digest = working_tree.pack(request.root, request.files, package)
        size = package.stat().st_size
        try:
            client.submit_job(
                entrypoint=request.entrypoint,
                submission_id=name,
                runtime_env=_runtime(request.root, name, package, cluster),
                metadata={_COMMAND: request.entrypoint, _TREE: digest},
                entrypoint_num_cpus=cluster.driver_cpus or None,
            )
        except RuntimeError as error:
            known = _known(client, name, request)
            if known is None:
                raise InputError(f"the cluster refused job {name}: {one_line(error)}") from None
            return known
    return f"job {name} sent to {cluster.address} with {len(request.files)} files ({size / 1e6:.1f} MB)"


def _known(client: Any, name: str, request: Request) -> str | None:
    """What there is to say of a job of that name; None where there is none."""
    info = info_of(client, name)
    if info is None:
        return None
    other = (info.metadata or {}).get(_COMMAND)
    if other != request.entrypoint:
        raise InputError(
            f"job {name} is there already, of another command ({other or 'not of dubito'}); choose another --job"
        )
    state = info.status.value
    if state in ("FAILED", "STOPPED"):
        raise InputError(f"job {name} was run already: {state}; choose another --job to run the command again")
    return f"job {name} is there already: {state}"


def info_of(client: Any, name: str) -> Any:
    """What the cluster knows of a job; None where there is none of that name."""
    try:
        return client.get_job_info(name)
    except RuntimeError as error:
        if "404" in str(error):
            return None
        raise


def _runtime(root: Path, name: str, package: Path, cluster: Cluster) -> dict[str, Any]:
    """Ray's runtime environment: the tree, our own variables (never a credential), and versions."""
    variables = {
        **RAY_DEFAULTS,
        **environment.travelling(),
        environment.LOG_FORMAT: environment.JSON_LOG,
        environment.RUN_ID: name,
    }
    runtime: dict[str, Any] = {"working_dir": str(package)}
    versions = pinned_versions.wanted(root)
    if cluster.environment != "any":
        variables[environment.PINNED_VERSIONS] = json.dumps(versions)
    if cluster.environment == "install":
        packages = [f"{each}=={version}" for each, version in versions.items() if each != "ray"]  # Ray is the cluster's
        options = ["--disable-pip-version-check"]
        if (root / pinned_versions.CONSTRAINTS).is_file():
            options += ["-c", f"${{RAY_RUNTIME_ENV_CREATE_WORKING_DIR}}/{pinned_versions.CONSTRAINTS}"]
        runtime["pip"] = {"packages": packages, "pip_check": False, "pip_install_options": options}
    return {**runtime, "env_vars": variables}


def follow(client: Any, name: str, address: str, terminal: JobOutput) -> int:
    """Show what the job says until it ends; returns its exit code. Ctrl-C detaches, the job goes on."""
    replay, seen, silent_since = JsonLogReplay(terminal), 0, 0.0

    def show(text: str) -> None:
        nonlocal seen
        seen += len(text)
        replay.feed(text)

    try:
        while True:
            with contextlib.suppress(Exception):  # the connection was lost; what is true is asked below
                asyncio.run(_tail(client, name, show, seen))
            try:
                info, silent_since = client.get_job_info(name), 0.0
            except Exception as error:  # of the network, in any of its libraries
                silent_since = silent_since or time.monotonic()
                if time.monotonic() - silent_since > PATIENCE_S:
                    raise OSError(f"the cluster at {address} does not answer any more: {error}") from error
                time.sleep(AGAIN_S)
                continue
            if info.status.is_terminal():
                break
            time.sleep(AGAIN_S)
        show(client.get_job_logs(name)[seen:])
        replay.close()
        return _code(info, name, terminal, list(replay.chatter))
    except KeyboardInterrupt:
        replay.close()
        terminal.say(
            f"detached; job {name} goes on. Follow it with: {_again('follow', name, address)}; "
            f"stop it with: {_again('stop', name, address)}"
        )
        return INTERRUPTED


async def _tail(client: Any, name: str, show: Any, skip: int) -> None:
    """Pass on the log as it grows; a new connection begins at its start, of which ``skip`` characters are known."""
    async for text in client.tail_job_logs(name):
        if skip >= len(text):
            skip -= len(text)
        else:
            show(text[skip:])
            skip = 0


def _code(info: Any, name: str, terminal: JobOutput, chatter: list[str]) -> int:
    """The exit code of a job that ended; says why where the job itself did not."""
    if info.status.value == "SUCCEEDED":
        return 0
    if info.status.value == "STOPPED":
        terminal.fail(f"job {name} was stopped")
        return INTERRUPTED
    code = getattr(info, "driver_exit_code", None)
    if code not in (1, 2, INTERRUPTED):
        said = "\n  ".join([one_line(info.message or "without a message"), *chatter])
        terminal.fail(f"job {name} failed: {said}")
    return code or 1


def _again(what: str, name: str, address: str) -> str:
    return f"dubito jobs {what} {name} --address {address}"
