"""The demo's results: how uncertainty shifts between datasets, and a PNG of the most doubtful images."""

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline import predictions
from pipeline.datasets.dataset import DatasetInfo, row_groups
from pipeline.datasets.shard_reader import read_row_group
from pipeline.metrics.ranking import auroc
from pipeline.report.gallery import gallery, most_doubtful

COLUMNS = ["image_id", "image", "height", "width", "mask", "boxes"]


def uncertainty_shift(test: pa.Table, shifted: pa.Table) -> dict[str, float]:
    """Mean uncertainty of the predictions of two datasets, and how well it tells them apart (AUROC, 1 = perfectly)."""
    low, high = (_uncertainty(table) for table in (test, shifted))
    return {
        "uncertainty_test": float(low.mean()),
        "uncertainty_shifted": float(high.mean()),
        "shift_auroc": auroc(low, high),
    }


def _uncertainty(table: pa.Table) -> Any:
    """The known uncertainties, (n,)."""
    return table["uncertainty"].drop_null().to_numpy()


def rows_of(info: DatasetInfo, split: str, image_ids: list[str]) -> pa.Table:
    """Dataset rows with these ids, in the order of the ids."""
    tables = (read_row_group(group, COLUMNS) for group in row_groups(info, split))
    table = pa.concat_tables(part.filter(pc.field("image_id").isin(image_ids)) for part in tables)
    row_by_id = {name: row for row, name in enumerate(table["image_id"].to_pylist())}
    return table.take(pa.array([row_by_id[name] for name in image_ids]))


def doubtful_images(task: str, datasets: list[tuple[str, DatasetInfo, str]], count: int = 4) -> bytes:
    """A PNG of the ``count`` most doubtful images of every (title, dataset, predictions URI)."""
    groups = []
    for title, info, uri in datasets:
        table = predictions.read(uri)
        groups.append((title, rows_of(info, "test", most_doubtful(table, count)), table))
    info = datasets[0][1]
    return gallery(groups, task, list(info.classes), info.background)
