"""The command line: ``dubito <verb>``. Each verb is one module of this package, imported when it is called."""

import importlib
import sys
from typing import Annotated, Any, Literal, NoReturn

import typer
from typer.core import TyperCommand

from pipeline import environment

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="From a bucket of images to models that say what they see, where it is, and when they are wrong.",
)
jobs = typer.Typer(no_args_is_help=True, help="What a cluster runs and ran: list, follow, stop.")
app.add_typer(jobs, name="jobs")
registry = typer.Typer(no_args_is_help=True, help="Champions: list, show, promote, rollback.")
app.add_typer(registry, name="registry")

Sets = Annotated[list[str], typer.Option("--set", metavar="a.b=c", help="Override one setting; repeatable.")]
Uri = Annotated[str, typer.Option(metavar="URI", help="A path, file:// or s3:// URI.")]
Address = Annotated[
    str, typer.Option(metavar="URL", envvar=environment.DASHBOARD_ADDRESS, help="Of the cluster's dashboard.")
]


_PANEL = "On a cluster"


def cluster_options(
    submit: Annotated[
        str,
        typer.Option(
            metavar="URL",
            help="Run on the Ray cluster whose dashboard answers there, and follow it.",
            rich_help_panel=_PANEL,
        ),
    ] = "",
    job: Annotated[
        str,
        typer.Option(metavar="ID", help="The job's name: the same one twice is one run.", rich_help_panel=_PANEL),
    ] = "",
    environment: Annotated[
        Literal["check", "install", "any"],
        typer.Option(
            help="Versions other than constraints.txt's: refuse them, let Ray install, or take them.",
            rich_help_panel=_PANEL,
        ),
    ] = "check",
    driver_cpus: Annotated[
        float,
        typer.Option(min=0, help="CPUs for the job's own process; 0: on the head.", rich_help_panel=_PANEL),
    ] = 0.0,
    detach: Annotated[bool, typer.Option("--detach", help="Do not follow.", rich_help_panel=_PANEL)] = False,
) -> None:
    """Declares the options that every verb has which a cluster can run; it is never called.

    Their meaning is that of the fields of ``jobs.submission.client.Cluster``.
    """


_cluster_group = typer.Typer(add_completion=False)
_cluster_group.command()(cluster_options)


class ClusterVerb(TyperCommand):
    """A verb that runs in this process, or with ``--submit`` as a job of a Ray cluster.

    It adds ``cluster_options`` to those that the verb declares, and takes them away again before the verb is called:
    a verb knows nothing of clusters.
    """

    def __init__(self, name: str | None, **settings: Any) -> None:
        super().__init__(name, **settings)
        # Typer reads the group's signature as it reads a verb's: types, defaults and help come out alike.
        self._cluster_parameters: list[Any] = [*typer.main.get_command(_cluster_group).params]
        self.params = [*self.params, *self._cluster_parameters]

    def invoke(self, ctx: Any) -> Any:
        """Call the verb, or send the same command to the cluster; either ends in ``typer.Exit`` with the exit code."""
        cluster = {parameter.name: ctx.params.pop(parameter.name) for parameter in self._cluster_parameters}
        if cluster["submit"]:
            client = importlib.import_module("jobs.submission.client")
            raise typer.Exit(client.submit_command(self, ctx.params, **cluster))
        useless = next((name for name in ("job", "detach") if cluster[name]), None)
        if useless:
            raise typer.BadParameter(f"--{useless} is of no use without --submit URL", ctx=ctx)
        return super().invoke(ctx)


def _run(verb: str, **options: Any) -> NoReturn:
    """Hand over to the module of a verb, imported only now, and exit with what its ``run`` returns."""
    raise typer.Exit(importlib.import_module(f"jobs.{verb}").run(**options))


@app.command(cls=ClusterVerb)
def ingest(
    format: Annotated[str, typer.Option(help="voc, coco, masks, instances or demo.")],
    out: Uri,
    images: Annotated[str, typer.Option(metavar="URI", help="Folder of images.")] = "",
    labels: Annotated[str, typer.Option(metavar="URI", help="Folder (coco: JSON file) of labels.")] = "",
    classes: Annotated[str, typer.Option(help="Class names in the order of their labels: a,b,c")] = "",
    splits: Annotated[
        str, typer.Option(metavar="URI", help="JSON file {split: [names]}, or a folder of <split>.txt lists.")
    ] = "",
    sets: Sets = [],  # noqa: B006 (typer wants a list)
) -> None:
    """Turn images and labels into a dataset: Parquet shards, rejects, dataset.json."""
    _run("ingest", format=format, out=out, images=images, labels=labels, classes=classes, splits=splits, sets=sets)


@app.command(cls=ClusterVerb)
def train(
    config: Annotated[str, typer.Argument(metavar="CONFIG.yaml", help="Settings; see jobs/configs/.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an unfinished run.")] = False,
    sets: Sets = [],  # noqa: B006
) -> None:
    """Train one model; writes OUT/bundle."""
    _run("train", config=config, resume=resume, sets=sets)


@app.command(cls=ClusterVerb)
def ensemble(
    config: Annotated[str, typer.Argument(metavar="CONFIG.yaml", help="Settings; see jobs/configs/.")],
    members: Annotated[int, typer.Option(min=1, help="Models that differ by seed.")] = 5,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an unfinished run.")] = False,
    sets: Sets = [],  # noqa: B006
) -> None:
    """Train M members side by side into one bundle; writes OUT/bundle."""
    _run("ensemble", config=config, members=members, resume=resume, sets=sets)


@app.command(cls=ClusterVerb)
def evaluate(
    bundle: Uri,
    data: Uri,
    out: Annotated[str, typer.Option(metavar="FILE.json", help="Where the metrics go; plots lie beside it.")],
    split: Annotated[str, typer.Option(help="train, val, calibration or test.")] = "test",
    shift_data: Annotated[
        str, typer.Option(metavar="URI", help="Unlike images, a dataset or a folder: does doubt tell them apart?")
    ] = "",
    shift_split: Annotated[str, typer.Option(help="Only this split of the shift data.")] = "",
) -> None:
    """Score a labelled split; write the metrics of the pool and of every member, and plots."""
    _run("evaluate", bundle=bundle, data=data, out=out, split=split, shift_data=shift_data, shift_split=shift_split)


@app.command(cls=ClusterVerb)
def calibrate(
    bundle: Uri,
    data: Annotated[str, typer.Option(metavar="URI", help="A dataset with a calibration split.")],
    out: Annotated[str, typer.Option(metavar="URI", help="Where the calibrated bundle goes.")],
    kind: Annotated[str, typer.Option(help="auto, temperature, vector, isotonic or none.")] = "auto",
    risk: Annotated[
        float | None, typer.Option(help="Accepted images have at most this mean loss (1 - IoU, or 1 - F1 of boxes).")
    ] = None,
    delta: Annotated[float, typer.Option(help="Probability that the promise is broken.")] = 0.1,
    sets: Annotated[
        list[str],
        typer.Option("--set", metavar="a.b=c", help="Change how members are asked, as in tta.flips=true; repeatable."),
    ] = [],  # noqa: B006
) -> None:
    """Fit calibration and review threshold on the calibration split; write a new bundle of the same weights."""
    _run("calibrate", bundle=bundle, data=data, out=out, kind=kind, risk=risk, delta=delta, sets=sets)


@app.command(cls=ClusterVerb)
def join(
    bundles: Annotated[list[str], typer.Option("--bundle", metavar="URI", help="A bundle; give it twice or more.")],
    out: Annotated[str, typer.Option(metavar="URI", help="Where the joined bundle goes.")],
    data: Annotated[str, typer.Option(metavar="URI", help="Calibrate on this dataset's calibration split.")] = "",
    risk: Annotated[
        float | None, typer.Option(help="With --data: accepted images have at most this mean loss.")
    ] = None,
    delta: Annotated[float, typer.Option(help="Probability that the promise is broken.")] = 0.1,
    sets: Annotated[
        list[str],
        typer.Option("--set", metavar="a.b=c", help="How members are asked and joined, as in fuse=wbf; repeatable."),
    ] = [],  # noqa: B006
) -> None:
    """Make one ensemble of the members of several bundles, of unlike models too."""
    _run("join", bundles=bundles, out=out, data=data, risk=risk, delta=delta, sets=sets)


@app.command(cls=ClusterVerb)
def predict(
    bundle: Uri,
    data: Annotated[str, typer.Option(metavar="URI", help="A dataset, or a folder of images.")],
    out: Uri,
    split: Annotated[str, typer.Option(help="Only this split of a dataset.")] = "",
) -> None:
    """Write predictions and uncertainty as Parquet, one row an image."""
    _run("predict", bundle=bundle, data=data, out=out, split=split)


@app.command(cls=ClusterVerb)
def verify(
    uri: Annotated[str, typer.Argument(metavar="URI", help="A dataset, a bundle, or a folder of predictions.")],
) -> None:
    """Read every committed file and compare it with its digest; damage is listed, exit code 2."""
    _run("verify", uri=uri)


@app.command(cls=ClusterVerb)
def retrain(
    config: Annotated[str, typer.Argument(metavar="CONFIG.yaml", help="See jobs/configs/retrain.yaml.")],
    force: Annotated[
        bool, typer.Option("--force", help="Train a challenger without a reason; it is judged all the same.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")] = False,
    every: Annotated[str, typer.Option(metavar="6h", help="Stay, and do it every so often: 30m, 6h, 1d.")] = "",
    cron: Annotated[str, typer.Option(metavar="'0 3 * * *'", help="Stay, and do it when cron would (UTC).")] = "",
    sets: Sets = [],  # noqa: B006
) -> None:
    """New labelled data? Train a challenger, judge it beside the champion, promote it or not."""
    _run("retrain", config=config, force=force, dry_run=dry_run, every=every, cron=cron, sets=sets)


@app.command()
def demo(
    out: Annotated[str, typer.Option(metavar="URI", help="Folder to write.")] = "runs/demo",
) -> None:
    """The whole path on generated images: data, two ensembles, predictions, doubt, in minutes."""
    _run("demo", out=out)


Registry = Annotated[str, typer.Option(metavar="URI", envvar=environment.REGISTRY, help="Of the registry.")]


@registry.command("list")
def list_models(registry: Registry) -> None:
    """Every model's champion."""
    raise typer.Exit(importlib.import_module("jobs.registry").show_all(registry))


@registry.command("show")
def show_model(name: str, registry: Registry) -> None:
    """All champions of a model, and what was decided."""
    raise typer.Exit(importlib.import_module("jobs.registry").show(registry, name))


@registry.command()
def promote(name: str, bundle: Annotated[str, typer.Argument(metavar="URI")], registry: Registry) -> None:
    """Make a bundle champion by hand, unjudged."""
    raise typer.Exit(importlib.import_module("jobs.registry").promote(registry, name, bundle))


@registry.command()
def rollback(
    name: str,
    registry: Registry,
    to: Annotated[int | None, typer.Option(help="Number of the entry; the last other one without.")] = None,
) -> None:
    """Make an earlier champion's bundle champion again."""
    raise typer.Exit(importlib.import_module("jobs.registry").rollback(registry, name, to))


@jobs.command("list")
def list_jobs(address: Address) -> None:
    """The cluster's jobs, the newest first."""
    raise typer.Exit(importlib.import_module("jobs.submission.jobs_command").show(address))


@jobs.command()
def follow(job: Annotated[str, typer.Argument(metavar="ID")], address: Address) -> None:
    """Show what a job says, from its beginning, until it ends; Ctrl-C detaches."""
    raise typer.Exit(importlib.import_module("jobs.submission.jobs_command").follow(job, address))


@jobs.command()
def stop(job: Annotated[str, typer.Argument(metavar="ID")], address: Address) -> None:
    """Stop a job. What it has committed stays, and the same command goes on from there."""
    raise typer.Exit(importlib.import_module("jobs.submission.jobs_command").stop(job, address))


def main(name: str | None = None) -> None:
    """Entry point of ``dubito``; with ``name``, of ``python -m jobs.<name>``."""
    app(args=[name, *sys.argv[1:]] if name else None)


if __name__ == "__main__":
    main()
