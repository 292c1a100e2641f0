"""Label formats. A new one is one file, one line in ``FORMATS`` and one line here.

base: what a format is: an index made once, and a pure reader that runs in tasks
files: source files listed, and images paired with labels by name
voc: Pascal VOC, one XML file an image
coco: COCO, one JSON file for all images
masks: one mask an image, by class ids or colours
instances: one label map an image, every value one object
demo: generated data with exact labels
"""

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
