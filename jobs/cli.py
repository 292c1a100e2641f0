"""The command line: ``dubito <verb>``. Each verb is one module of this package, imported when it is called."""

import importlib
import sys
from typing import Annotated

import typer

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="From a bucket of images to models that say what they see, where it is, and when they are wrong.",
)

Sets = Annotated[list[str], typer.Option("--set", metavar="a.b=c", help="Override one setting; repeatable.")]
Uri = Annotated[str, typer.Option(metavar="URI", help="A path, file:// or s3:// URI.")]


def _run(verb: str, **options: object) -> None:
    raise typer.Exit(importlib.import_module(f"jobs.{verb}").run(**options))


@app.command()
def ingest(
    format: Annotated[str, typer.Option(help="voc, coco, masks, instances or demo.")],
    out: Uri,
    images: Annotated[str, typer.Option(metavar="URI", help="Folder of images.")] = "",
    labels: Annotated[str, typer.Option(metavar="URI", help="Folder (coco: JSON file) of labels.")] = "",
    classes: Annotated[str, typer.Option(help="Class names in the order of their labels: a,b,c")] = "",
    splits: Annotated[str, typer.Option(help="JSON file {split: [names]}, or a folder of <split>.txt lists.")] = "",
    sets: Sets = [],  # noqa: B006 (typer wants a list)
) -> None:
    """Turn images and labels into a dataset: Parquet shards, rejects, dataset.json."""
    _run(
        "ingest",
        format=format,
        images=images,
        labels=labels,
        out=out,
        classes=classes,
        splits=splits,
        sets=sets,
    )


@app.command()
def train(
    config: Annotated[str, typer.Argument(metavar="CONFIG.yaml", help="Settings; see jobs/configs/.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an unfinished run.")] = False,
    sets: Sets = [],  # noqa: B006
) -> None:
    """Train one model; writes OUT/bundle."""
    _run("train", config=config, resume=resume, sets=sets)


@app.command()
def ensemble(
    config: Annotated[str, typer.Argument(metavar="CONFIG.yaml", help="Settings; see jobs/configs/.")],
    members: Annotated[int, typer.Option(min=1, help="Models that differ by seed.")] = 5,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an unfinished run.")] = False,
    sets: Sets = [],  # noqa: B006
) -> None:
    """Train M members side by side into one bundle; writes OUT/bundle."""
    _run("ensemble", config=config, members=members, resume=resume, sets=sets)


@app.command()
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
    _run(
        "evaluate",
        bundle=bundle,
        data=data,
        split=split,
        out=out,
        shift_data=shift_data,
        shift_split=shift_split,
    )


@app.command()
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


@app.command()
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


@app.command()
def predict(
    bundle: Uri,
    data: Annotated[str, typer.Option(metavar="URI", help="A dataset, or a folder of images.")],
    out: Uri,
    split: Annotated[str, typer.Option(help="Only this split of a dataset.")] = "",
) -> None:
    """Write predictions and uncertainty as Parquet, one row an image."""
    _run("predict", bundle=bundle, data=data, out=out, split=split)


@app.command()
def verify(
    uri: Annotated[str, typer.Argument(metavar="URI", help="A dataset, a bundle, or a folder of predictions.")],
) -> None:
    """Read every committed file and compare it with its digest; damage is listed, exit code 2."""
    _run("verify", uri=uri)


@app.command()
def demo(
    out: Annotated[str, typer.Option(metavar="URI", help="Folder to write.")] = "runs/demo",
) -> None:
    """The whole path on generated images: data, two ensembles, predictions, doubt, in minutes."""
    _run("demo", out=out)


def main(verb: str | None = None) -> None:
    """Entry point of ``dubito``; with ``verb``, of ``python -m jobs.<verb>``."""
    app(args=[verb, *sys.argv[1:]] if verb else None)


if __name__ == "__main__":
    main()
