"""``dubito train``: an ensemble of one."""

from jobs import ensemble


def run(config: str, resume: bool, sets: list[str]) -> int:
    """Run the job; returns the exit code."""
    return ensemble.run(config, 1, resume, sets, verb="train")
