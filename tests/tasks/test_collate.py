"""What the two tasks have in common: rows to batches, settings, losses."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline import schema
from pipeline.errors import InputError
from pipeline.tasks import TASKS, Detection
from pipeline.tasks.base import image_area
from tests.support.task_cases import box, detection, output_of, png, random_mask, segmentation, table_of


def test_masks_reach_the_batch_and_decode_failures_the_list():
    sizes = [(16, 24), (16, 24), (8, 12), (16, 24)]
    masks = [random_mask(*size, n) for n, size in enumerate(sizes)]
    table = table_of(sizes, mask=[schema.pack_map(mask.tobytes()) for mask in masks])
    table = table.set_column(1, "image", pa.array([table["image"][0].as_py(), b"no image", None, png(16, 24, 3)]))
    batch, failures = segmentation().collate(table, train=False, seed=0)
    assert [(row, reason) for row, reason, _ in failures] == [(1, "corrupt"), (2, "missing")]
    assert batch.image_ids == ["i0", "i3"]
    assert batch.masks is not None
    assert batch.boxes is None
    assert np.array_equal(batch.masks.numpy(), np.stack([masks[0], masks[3]]))
    assert batch.sizes.tolist() == [[16, 24], [16, 24]]


def test_letterboxed_masks_are_void_around_the_image():
    mask = np.zeros((16, 16), np.uint8)
    table = table_of([(16, 16)], mask=[schema.pack_map(mask.tobytes())])
    batch, _ = segmentation().collate(table, train=False, seed=0)
    assert batch.masks is not None
    assert batch.masks[0, :, 4:20].eq(0).all()
    assert batch.masks[0, :, :4].eq(schema.VOID).all()
    assert image_area(batch).tolist() == [[4, 0, 20, 16]]


def test_a_table_without_labels_gives_a_batch_without_labels():
    for task in (segmentation(), detection()):
        batch, failures = task.collate(table_of([(16, 24)]), train=False, seed=0)
        assert (batch.masks, batch.boxes, batch.labels, failures) == (None, None, None, [])


def test_no_row_that_can_be_decoded_gives_an_empty_batch():
    table = table_of([(4, 4)], mask=[None], boxes=[None]).set_column(1, "image", pa.array([b"?"]))
    for task in (segmentation(), detection()):
        batch, failures = task.collate(table, train=False, seed=0)
        assert (len(batch), len(failures)) == (0, 1)
        assert batch.images.shape[0] == 0


def test_an_image_of_another_size_than_its_labels_is_a_failure():
    table = table_of([(16, 24)], mask=[schema.pack_map(bytes(16 * 24))])
    table = table.set_column(table.column_names.index("height"), "height", pa.array([17], pa.int32()))
    _, failures = segmentation().collate(table, train=False, seed=0)
    assert failures == [(0, "corrupt", "decodes to 16x24, its labels are for 17x24")]


@pytest.mark.parametrize("chunked", [False, True])
def test_boxes_reach_the_batch_row_by_row(chunked):
    boxes = [[box(1, 2, 9, 8, 1), box(0, 0, 4, 4, 0, True)], [], None, [box(3, 3, 30, 30, 0, None)]]
    table = table_of([(32, 32)] * 4, boxes=boxes)
    # Slices and chunks: offsets do not start at 0.
    table = pa.concat_tables([table.slice(0, 1), table.slice(1, 3)]) if chunked else table
    batch, failures = detection().collate(table, train=False, seed=0)
    assert not failures
    assert batch.boxes is not None
    assert batch.labels is not None
    assert batch.crowd is not None
    assert batch.labels.tolist() == [[1, 0], [-1, -1], [-1, -1], [0, -1]]
    assert batch.crowd.tolist() == [[False, True], [False, False], [False, False], [False, False]]
    assert batch.boxes[0].tolist() == [[1, 2, 9, 8], [0, 0, 4, 4]]
    assert batch.boxes[3, 0].tolist() == [3, 3, 30, 30]
    tail, _ = detection().collate(table.slice(3, 1), train=False, seed=0)
    assert tail.boxes is not None
    assert tail.boxes.tolist() == [[[3, 3, 30, 30]]]


def test_training_rows_must_be_labelled():
    table = table_of([(16, 24)] * 2, mask=[schema.pack_map(bytes(16 * 24)), None], boxes=[[], None])
    keys = {"epoch": pa.array([0, 0], pa.int64()), "position": pa.array([4, 5], pa.int64())}
    for name, values in keys.items():
        table = table.append_column(name, values)
    with pytest.raises(InputError, match="image 'i1' is in the train split but has no mask; label it"):
        segmentation().collate(table, train=True, seed=0)
    with pytest.raises(InputError, match="image 'i1' is in the train split but has no boxes; label it"):
        detection().collate(table, train=True, seed=0)
    batch, _ = segmentation().collate(table, train=False, seed=0)
    assert batch.masks is not None
    assert batch.masks[1].eq(schema.VOID).all()


def test_training_windows_depend_on_seed_epoch_and_position_alone():
    sizes = [(64, 80)] * 3
    masks = [schema.pack_map(random_mask(*size, n).tobytes()) for n, size in enumerate(sizes)]
    table = table_of(sizes, mask=masks, epoch=[0, 0, 3], position=[7, 8, 9])
    task = segmentation(fit="crop")
    whole, _ = task.collate(table, train=True, seed=5)
    last, _ = task.collate(table.slice(2), train=True, seed=5)
    other, _ = task.collate(table, train=True, seed=6)
    assert torch.equal(whole.images[2], last.images[0])
    assert torch.equal(whole.matrices[2], last.matrices[0])
    assert not torch.equal(whole.matrices, other.matrices)
    assert whole.epochs.tolist() == [0, 0, 3]
    assert whole.positions.tolist() == [7, 8, 9]
    with pytest.raises(ValueError, match="needs the column 'epoch'"):
        task.collate(table.drop_columns(["epoch"]), train=True, seed=5)


def test_validation_collates_in_inference_mode_with_threads():
    table = table_of([(16, 24)] * 4, mask=[schema.pack_map(bytes(16 * 24))] * 4)
    task = segmentation(size=(8, 8))
    with torch.inference_mode():
        inside, _ = task.collate(table, train=False, seed=0)
    outside, _ = task.collate(table, train=False, seed=0)
    assert torch.equal(inside.images, outside.images)
    assert not inside.images.is_inference()


def test_labels_of_unknown_classes_are_refused():
    table = table_of([(4, 4)], mask=[schema.pack_map(bytes([3] * 16))], boxes=[[box(0, 0, 2, 2, 2)]])
    with pytest.raises(InputError, match="mask of image 'i0' has the value 3, but there are 3 classes"):
        segmentation().collate(table, train=False, seed=0)
    with pytest.raises(InputError, match="boxes of image 'i0' have labels 2 to 2, but there are 2 classes"):
        detection().collate(table, train=False, seed=0)


def test_a_mask_of_the_wrong_length_is_refused():
    table = table_of([(4, 4)], mask=[schema.pack_map(bytes(15))])
    with pytest.raises(InputError, match="mask of image 'i0' is not 4x4 packed pixels"):
        segmentation().collate(table, train=False, seed=0)


def test_number_of_outputs():
    assert segmentation().num_outputs == 3
    assert detection().num_outputs == 2
    assert detection(background=None).num_outputs == 3
    assert detection(background=0).num_outputs == 3


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ({"crossentropy": 1}, "loss: unknown name 'crossentropy'. Did you mean 'cross_entropy'?"),
        ({"dice": "much"}, "loss.dice: wanted a positive weight, found 'much'"),
        ({"dice": 0}, "loss.dice: wanted a positive weight, found 0"),
        ({"focal": {"gama": 2}}, "loss.focal: unknown key 'gama'. Did you mean 'gamma'?"),
    ],
)
def test_wrong_losses_are_refused_by_name(loss, message):
    with pytest.raises(InputError) as error:
        segmentation(loss=loss)
    assert str(error.value).startswith(message)


def test_wrong_settings_are_refused_by_name():
    with pytest.raises(InputError, match="predict: unknown key 'score_treshold'. Did you mean 'score_threshold'"):
        detection(predict={"score_treshold": 0.5})
    with pytest.raises(InputError, match="predict: unknown key 'patches'"):
        segmentation(predict={"patches": 0.5})
    with pytest.raises(InputError, match="loss: unknown key 'cls'"):
        Detection.parse_loss({"cls": 1}, "loss")


def test_losses_carry_weights_settings_and_the_counts():
    loss = {"cross_entropy": 0.5, "focal": {"weight": 2, "gamma": 0.0}}
    task = segmentation(loss=loss, size=(4, 4))
    table = table_of([(4, 4)] * 2, mask=[schema.pack_map(random_mask(4, 4, n).tobytes()) for n in range(2)])
    batch, _ = task.collate(table, train=False, seed=0)
    logits = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    terms = task.loss(logits, batch)
    assert sorted(terms) == task.loss_terms == ["cross_entropy", "focal"]
    assert (terms["cross_entropy"][0], terms["focal"][0]) == (0.5, 2)
    # Focal loss with gamma 0 is the cross entropy.
    torch.testing.assert_close(terms["focal"][1], terms["cross_entropy"][1])
    assert batch.masks is not None
    labelled = (batch.masks != schema.VOID).sum().item()
    for name, count in task.counts(batch).items():
        assert count.item() == labelled
        assert terms[name][2].item() == labelled


def test_detection_loss_terms_are_named_and_counted():
    task = detection()
    table = table_of([(32, 32)] * 2, boxes=[[box(2, 2, 12, 12, 1), box(0, 0, 9, 9, 0, True)], []])
    batch, _ = task.collate(table, train=False, seed=0)
    terms = task.loss(output_of(2, (32, 32), 0), batch)
    assert sorted(terms) == task.loss_terms
    assert {name: count.item() for name, count in task.counts(batch).items()} == dict.fromkeys(task.loss_terms, 1)


def test_both_tasks_are_in_the_table():
    assert {name: cls.name for name, cls in TASKS.items()} == {
        "segmentation": "segmentation",
        "detection": "detection",
    }
