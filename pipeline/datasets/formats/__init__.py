"""Label formats. A new one is one file and one line here."""

from pipeline.datasets.formats.base import Format
from pipeline.datasets.formats.coco import Coco
from pipeline.datasets.formats.demo import Demo
from pipeline.datasets.formats.instances import Instances
from pipeline.datasets.formats.masks import Masks
from pipeline.datasets.formats.voc import Voc

FORMATS: dict[str, Format] = {
    "voc": Voc(),
    "coco": Coco(),
    "masks": Masks(),
    "instances": Instances(),
    "demo": Demo(),
}
"""Format name, as in ``dubito ingest --format``, -> its one instance."""
