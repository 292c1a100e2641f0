"""A job's log is followed over lost connections, and its end becomes an exit code."""

import io
import json
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from ray.job_submission import JobStatus

from jobs.submission import follow
from jobs.submission.follow import follow_job
from pipeline.runtime.progress import Terminal

LINES = [json.dumps({"time": "", "level": "info", "message": f"message {n}"}) + "\n" for n in range(4)]


class Client:
    """A cluster whose first connection is lost within a line, and which then does not answer once."""

    def __init__(self, status: JobStatus, code: int | None = None) -> None:
        self.log = "".join(LINES)
        self.status = status
        self.code = code
        self.connections = 0
        self.questions = 0

    async def tail_job_logs(self, name: str) -> AsyncIterator[str]:
        self.connections += 1
        if self.connections == 1:
            yield self.log[:70]
            raise ConnectionError("lost")
        yield self.log[:100]
        yield self.log[100:150]

    def get_job_info(self, name: str) -> Any:
        self.questions += 1
        if self.questions == 1:
            raise ConnectionError("no answer")
        return SimpleNamespace(status=self.status, driver_exit_code=self.code, message="out of memory")

    def get_job_logs(self, name: str) -> str:
        return self.log


@pytest.mark.parametrize(
    ("status", "driver_code", "code", "error"),
    [
        (JobStatus.SUCCEEDED, 0, 0, ""),
        (JobStatus.FAILED, 2, 2, ""),
        (JobStatus.FAILED, None, 1, "job j failed: out of memory\n"),
        (JobStatus.STOPPED, None, 130, "job j was stopped\n"),
    ],
)
def test_each_message_is_shown_once_whatever_the_connection_does(
    status: JobStatus, driver_code: int | None, code: int, error: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(follow, "RETRY_S", 0.0)
    out, err = io.StringIO(), io.StringIO()
    assert follow_job(Client(status, driver_code), "j", "http://x:1", Terminal(out, err)) == code
    assert out.getvalue().splitlines() == [f"message {n}" for n in range(4)]
    assert err.getvalue() == error
