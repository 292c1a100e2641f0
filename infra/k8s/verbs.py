"""What each verb of the command line is given when it runs as a job of its own on Kubernetes."""

from dataclasses import dataclass

from jobs.cli import app

ROOT = "$DUBITO_ROOT"
"""Filled in by the shell, from the ConfigMap ``dubito-storage``: s3://BUCKET/PREFIX, or /data."""
CONFIGS = "/etc/dubito"
"""Where the ConfigMap ``dubito-configs`` lies in every pod."""
LEFT_OUT = {"demo": "it is for one machine"}
"""Verbs that are no cluster jobs, and why."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One verb as a job of its own.

    Attributes:
        arguments: After ``dubito VERB``; an example, to be edited.
        gpu: GPU nodes of the job's cluster.
        cpu: CPU-only nodes of it.
        again: Why starting the same command again is right.
    """

    arguments: str
    gpu: int = 0
    cpu: int = 1
    again: str = "what it committed already is found, and not done again"


_RUN = f"{ROOT}/runs/bccd"
_DATA = f"{ROOT}/data/bccd"
_TRAIN = f"{CONFIGS}/train.yaml --resume --set data={_DATA}"
_GOES_ON = "--resume with the same 'out' goes on from the last checkpoint, and begins where there is none"

RETRAIN = (
    f"--set registry={ROOT}/registry --set work={ROOT}/retrain --set data={ROOT}/data/cells "
    f"--set recipe={CONFIGS}/train.yaml"
)
"""After the config, in the job and in the schedules alike."""

JOBS = {
    "ingest": Job(
        arguments=f"--format voc --images {ROOT}/raw/JPEGImages --labels {ROOT}/raw/Annotations "
        f"--splits {ROOT}/raw/ImageSets/Main --out {_DATA}",
        cpu=2,
    ),
    "train": Job(arguments=f"{_TRAIN} --set out={_RUN}", gpu=1, again=_GOES_ON),
    "ensemble": Job(arguments=f"{_TRAIN} --set out={_RUN}-5 --members 5", gpu=2, again=_GOES_ON),
    "evaluate": Job(
        arguments=f"--bundle {_RUN}-5/bundle --data {_DATA} --split test --out {_RUN}-5/metrics.json", gpu=1
    ),
    "calibrate": Job(
        arguments=f"--bundle {_RUN}-5/bundle --data {_DATA} --risk 0.2 --delta 0.1 --out {_RUN}-5/reviewed", gpu=1
    ),
    "join": Job(
        arguments=f"--bundle {_RUN}-5/bundle --bundle {_RUN}-other/bundle --data {_DATA} --out {ROOT}/runs/joined",
        gpu=1,
    ),
    "predict": Job(
        arguments=f"--bundle {_RUN}-5/bundle --data {ROOT}/new-images --out {ROOT}/predictions/new-images",
        gpu=2,
        cpu=2,
        again="an unfinished prediction with the same inputs goes on by itself, each image once",
    ),
    "verify": Job(arguments=_DATA, again="it only reads"),
    "retrain": Job(
        arguments=f"{CONFIGS}/retrain.yaml {RETRAIN}",
        gpu=1,
        again="a retrain that was cut off is finished by the next one",
    ),
}
"""By verb. ``_RUN``, ``_DATA`` and so on are examples: they fit together, so that the files can be tried in order."""


def of_the_command_line() -> set[str]:
    """Verbs that ``dubito`` has; groups of verbs such as ``dubito jobs`` are not among them."""
    return {
        command.name or command.callback.__name__.replace("_", "-")
        for command in app.registered_commands
        if command.callback is not None
    }


def jobs() -> dict[str, Job]:
    """The jobs to write, by verb, in the order of the table.

    Raises:
        LookupError: The command line has a verb that this table does not know, or the other way round.
    """
    table, verbs = set(JOBS), of_the_command_line() - set(LEFT_OUT)
    if verbs - table:
        raise LookupError(
            f"dubito has verbs that infra/k8s/verbs.py does not know: {', '.join(sorted(verbs - table))}; give each "
            "its arguments in JOBS, or a reason in LEFT_OUT"
        )
    if table - verbs:
        raise LookupError(
            f"infra/k8s/verbs.py has verbs that dubito does not have: {', '.join(sorted(table - verbs))}; "
            "take them out of JOBS"
        )
    return dict(JOBS)
