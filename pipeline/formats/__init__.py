"""Label formats. A new one is one file and one line here."""

from pipeline.formats.base import Format
from pipeline.formats.coco import Coco
from pipeline.formats.demo import Demo
from pipeline.formats.instances import Instances
from pipeline.formats.masks import Masks
from pipeline.formats.voc import Voc

FORMATS: dict[str, Format] = {
    "voc": Voc(),
    "coco": Coco(),
    "masks": Masks(),
    "instances": Instances(),
    "demo": Demo(),
}
"""Format name, as in ``dubito ingest --format``, -> its one instance."""
