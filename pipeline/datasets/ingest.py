"""Labels as people have them -> a dataset: shards, rejects and dataset.json, which commits them."""

import hashlib
import json
import pickle
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from pipeline import schema, storage
from pipeline.config import first_difference
from pipeline.datasets import metadata, shard_writer
from pipeline.datasets import splits as splitting
from pipeline.datasets.dataset import DATASET_JSON, committed_metadata
from pipeline.datasets.formats import FORMATS
from pipeline.datasets.formats.base import Context, Index, IngestSettings, Reject
from pipeline.errors import InputError, nearest
from pipeline.runtime import prometheus, resources
from pipeline.runtime.progress import Progress, ProgressSink, SilentSink
from pipeline.storage import checksum


def ingest(
    format: str,
    images: str | None,
    labels: str | None,
    out: str,
    classes: Sequence[str] | None = None,
    splits: str | None = None,
    options: dict[str, Any] | None = None,
    sink: ProgressSink | None = None,
) -> dict[str, Any]:
    """Write a dataset to ``out``: one Ray Data job, committed by dataset.json last.

    Args:
        format: A name of ``FORMATS``.
        images: URI of the images; None or empty for a format that generates them.
        labels: URI of the labels, as the format has it; None or empty where it needs none.
        out: URI of the dataset's folder.
        classes: Names in label order; None where the format finds them.
        splits: JSON file or folder of lists; None = shares held out by hash.
        options: ``--set`` values: ``IngestSettings`` and the format's own.
        sink: Where progress goes.

    Returns:
        The summary: uri, name, fingerprint, classes, tasks, images, splits {split: images}, unlabelled,
        left_out, rejects {reason: n}, repairs {name: n}, notes, seconds, and ``already``: True if ``out``
        was committed before by the same inputs and nothing was done.

    Raises:
        InputError: Unusable inputs, more rejects than ``max_reject_fraction``, or ``out`` is taken.
    """
    began = time.monotonic()
    form = FORMATS.get(format)
    if form is None:
        raise InputError(f"unknown format '{format}'.{nearest(format, FORMATS)}")
    settings = form.settings.parse(options or {}, "--set")
    uri = storage.absolute(out)
    if storage.scheme_of(uri) not in ("file", "s3", "gs"):
        raise InputError(f"--out '{out}': a dataset cannot be committed there; use file, s3 or gs")
    lists = splitting.read_splits(splits, settings.split_names) if splits else None
    source = {
        "schema_version": schema.SCHEMA_VERSION,
        "format": format,
        "images": storage.absolute(images) if images else None,
        "labels": storage.absolute(labels) if labels else None,
        "classes": list(classes) if classes else None,
        "splits": _digest(json.dumps(lists, sort_keys=True)) if lists is not None else None,
        "options": settings.to_dict(),
    }
    committed = committed_metadata(uri)
    if committed is not None:
        _refuse_other(uri, committed, source)
    index = form.index(source["images"], source["labels"], classes, settings)
    if settings.referenced and any(item.image_uri is None for item in index.sources):
        raise InputError(f"referenced: format '{format}' makes its images, there is nothing to refer to; leave it out")
    source["listing"] = _listing(index)
    if committed is not None:
        _refuse_other(uri, committed, source)
        return metadata.ingest_summary(uri, committed, time.monotonic() - began, already=True)
    meta = _build_metadata(uri, format, index, lists, source, settings, sink or SilentSink())
    if not storage.create_once(storage.join(uri, DATASET_JSON), _json(checksum.with_checksum(meta))):
        raise InputError(f"'{uri}' was committed by somebody else meanwhile; choose another --out")
    return metadata.ingest_summary(uri, meta, time.monotonic() - began, already=False)


def _refuse_other(uri: str, committed: dict[str, Any], source: dict[str, Any]) -> None:
    committed_source = {key: value for key, value in committed.get("source", {}).items() if key in source}
    different = first_difference(committed_source, source)
    if different:
        raise InputError(f"'{uri}' already holds a dataset made from other inputs: {different}; choose another --out")


def _listing(index: Index) -> str:
    """Digest of what was found: names, sizes and inline labels."""
    lines = [
        f"{item.image_id}\0{item.size}\0{item.label_uri}\0{item.label_size}\0{_digest(item.label or b'')}"
        for item in index.sources
    ]
    return _digest("\n".join(sorted(lines)))


def _digest(text: str | bytes) -> str:
    return hashlib.sha256(text.encode() if isinstance(text, str) else text).hexdigest()


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def _build_metadata(
    uri: str,
    format_name: str,
    index: Index,
    lists: dict[str, list[str]] | None,
    source: dict[str, Any],
    settings: IngestSettings,
    sink: ProgressSink,
) -> dict[str, Any]:
    """Everything but the commit; returns the content of dataset.json."""
    # Whatever the index alone can tell is refused before a task starts.
    assignment = splitting.assign(index.sources, lists, settings, format_name)
    used_sources = [item for item in index.sources if item.image_id in assignment.split_of]
    rejects = [*index.rejects, *assignment.rejects]
    metadata.check_rejects(uri, rejects, len(used_sources), settings)
    if not used_sources:
        why = "--splits names none of the images" if lists is not None else "there are no images"
        raise InputError(f"the dataset would be empty: {why} ({len(index.sources)} found); check --images and --splits")
    if not settings.referenced:
        resources.require_disk(uri, sum(item.size for item in used_sources), f"{len(used_sources)} images")
    plans = shard_writer.plan_shards(uri, format_name, used_sources, assignment.split_of, settings.shard_bytes)
    # One task a shard; what comes back of each is small: counts, digests, rejects, and the file's hash.
    progress = Progress(sink, "ingest", len(used_sources))
    statistics_of: dict[str, shard_writer.SplitStatistics] = {}
    digests: list[tuple[str, str, str, str | None]] = []
    files: list[dict[str, Any]] = []
    for plan_uri, written in _count_shards(_write_shards(plans, index.context), rejects):
        progress.advance(written.sources)
        rejects.extend(written.rejects)
        if written.file is not None:
            statistics_of.setdefault(written.split, shard_writer.SplitStatistics()).add(written.sums)
            digests += [(row[0], written.split, *row[1:]) for row in written.digests]
            path = plan_uri.removeprefix(uri + "/")
            files.append({"path": path, "split": written.split, **written.file})
    # Asked again, now that images were decoded and labels read.
    rejects.sort(key=lambda item: (item.reason, item.uri))
    metadata.check_rejects(uri, rejects, len(digests), settings)
    if not digests:
        raise InputError(
            f"the dataset would be empty: none of {len(used_sources)} images could be used, see '{uri}/rejects'"
        )
    context = index.context
    # Digests and rejects are files of the dataset too: dataset.json names them with their hashes.
    files = [*sorted(files, key=lambda file: file["path"]), metadata.write_digests(uri, digests)]
    if rejects:
        files.append(metadata.write_rejects(uri, rejects))
    repairs: Counter[str] = sum((part.repairs for part in statistics_of.values()), Counter())
    return {
        "schema_version": schema.SCHEMA_VERSION,
        "name": settings.name or uri.rsplit("/", 1)[-1],
        "classes": list(context.classes),
        "colours": index.colours or metadata.palette(len(context.classes)),
        "background": context.background,
        "tasks": list(context.tasks),
        "counts": metadata.split_counts(statistics_of, context),
        "statistics": metadata.statistics(statistics_of),
        "repairs": dict(sorted(repairs.items())),
        "rejects": metadata.rejects_by_reason(rejects),
        "left_out": assignment.left_out,
        "referenced": settings.referenced,
        "notes": metadata.dataset_notes(statistics_of, context),
        "fingerprint": metadata.fingerprint(digests, context),
        "source": source,
        "files": files,
    }


def _count_shards(
    finished_shards: Iterator[tuple[str, shard_writer.WrittenShard]], rejects: Sequence[Reject]
) -> Iterator[tuple[str, shard_writer.WrittenShard]]:
    """The same shards, counted for those who watch, as are ``rejects`` of before."""
    with prometheus.running(prometheus.stage_tags("ingest")) as recorder:
        for item in rejects:
            recorder.count("dubito_rejects_total", 1, item.reason)
        for uri, written in finished_shards:
            recorder.count("dubito_images_total", len(written.digests), "ok")
            for item in written.rejects:
                recorder.count("dubito_rejects_total", 1, item.reason)
            yield uri, written


def _write_shards(
    plans: list[shard_writer.ShardPlan], context: Context
) -> Iterator[tuple[str, shard_writer.WrittenShard]]:
    """The one Ray Data job: a task a shard, small rows back, in any order."""
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    items = [{"plan": pickle.dumps(plan)} for plan in plans]
    dataset = ray.data.from_items(items, override_num_blocks=len(items))
    for row in dataset.map(partial(_write_shard_task, context=context)).iter_rows():
        yield pickle.loads(row["written"])  # by our own task, a moment ago


def _write_shard_task(row: dict[str, Any], context: Context) -> dict[str, Any]:
    plan = pickle.loads(row["plan"])
    return {"written": pickle.dumps((plan.uri, shard_writer.write_shard(plan, context)))}
