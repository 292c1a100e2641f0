"""``dubito registry``: lists champions and decisions, and changes the champion by hand."""

from collections.abc import Callable
from typing import Any

from jobs.session import run_job
from pipeline.errors import InputError
from pipeline.runtime.progress import JobOutput


def show_all(registry: str) -> int:
    """Every model's champion; returns the exit code."""

    def story(terminal: JobOutput) -> None:
        from pipeline.retraining import registry as champions

        names = champions.names(registry)
        for name in names:
            terminal.say(f"{name}: {_line(champions.champion(registry, name))}")
        if not names:
            terminal.say(f"no champion in '{registry}'")

    return run_job("registry", story, on_this_machine=False)


def show(registry: str, name: str) -> int:
    """All champions of a model and all decisions; returns the exit code."""

    def story(terminal: JobOutput) -> None:
        from pipeline.retraining import registry as champions

        entries, decisions = champions.entries(registry, name), champions.decisions(registry, name)
        if not entries and not decisions:
            raise InputError(
                f"no model '{name}' in '{registry}'; known: {', '.join(champions.names(registry)) or 'none'}"
            )
        for entry in entries:
            terminal.say(_line(entry))
        for decision in decisions:
            word = "promoted" if decision["promote"] else "refused"
            terminal.say(f"{decision['time']}  run {decision['run']}  {word}  bundle {decision['challenger']['id']}")
            for reason in decision["reasons"]:
                terminal.say(f"    {reason}")

    return run_job("registry", story, on_this_machine=False)


def _line(entry: Any) -> str:
    return f"{entry.number:>4}  {entry.time}  {entry.kind:9}  bundle {entry.bundle_id}  {entry.bundle}"


def promote(registry: str, name: str, bundle: str) -> int:
    """Make a bundle champion; returns the exit code."""
    return _change(name, lambda champions: champions.promote(registry, name, bundle))


def rollback(registry: str, name: str, to: int | None) -> int:
    """Make an earlier champion's bundle champion again; returns the exit code."""
    return _change(name, lambda champions: champions.rollback(registry, name, to))


def _change(name: str, change: Callable[[Any], Any]) -> int:
    def story(terminal: JobOutput) -> None:
        from pipeline.retraining import registry as champions

        try:
            champion = change(champions)
        except champions.OvertakenError as error:
            raise InputError(f"{error}; look at it, and give the command again") from None
        terminal.say(
            f"champion {champion.number} of '{name}' is bundle {champion.bundle_id} ({'; '.join(champion.reasons)})"
        )

    return run_job("registry", story, on_this_machine=False)
