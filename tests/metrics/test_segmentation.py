"""Segmentation's figures against slow definitions, and against torchmetrics, torch-uncertainty and scikit-learn."""

import json
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from pipeline.metrics import SegmentationMetric
from pipeline.metrics.pixels import BOUNDARY, ENTROPY_BINS, boundary_bands, entropy_bins
from pipeline.schema import VOID
from tests.support.metric_cases import BACKGROUND, CLASSES, flat, pixels, segmentation


def _torch_uncertainty():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("torch_uncertainty")
        from torch_uncertainty.metrics import classification
    return classification


def test_overlap_likelihood_and_calibration_equal_the_definitions():
    items = pixels(0)
    p, truth = flat(items)
    said = p.argmax(0)
    got = segmentation(items).compute()
    for c in range(CLASSES):
        iou = ((said == c) & (truth == c)).sum() / ((said == c) | (truth == c)).sum()
        assert got["iou"][c] == pytest.approx(iou)
        assert got["confusion"][c] == [((truth == c) & (said == k)).sum() for k in range(CLASSES)]
    assert got["miou"] == pytest.approx(np.mean(got["iou"]))
    dice = [2 * iou / (1 + iou) for iou in got["iou"]]
    assert got["dice"] == pytest.approx(np.mean(dice))
    assert got["accuracy"] == pytest.approx((said == truth).mean())
    right = p[truth, np.arange(len(truth))]
    assert got["nll"] == pytest.approx(-np.log(right).mean(), rel=1e-6)
    assert got["brier"] == pytest.approx(((p - np.eye(CLASSES)[truth].T) ** 2).sum(0).mean(), rel=1e-6)
    assert got["ece"] == pytest.approx(_calibration_error(p.max(0), said == truth), rel=1e-6)
    each = [_calibration_error(p[c], truth == c) for c in range(CLASSES)]
    assert got["ece_classwise"] == pytest.approx(np.mean(each), rel=1e-6)
    assert (got["images"], got["pixels"]) == (5, len(truth))
    json.dumps(got, allow_nan=False)


def _calibration_error(confidence: np.ndarray, hit: np.ndarray) -> float:
    error = 0.0
    for k in range(15):
        inside = (confidence > k / 15) & (confidence <= (k + 1) / 15)
        if inside.any():
            error += inside.mean() * abs(hit[inside].mean() - confidence[inside].mean())
    return error


def test_reliability_bins_give_the_calibration_error_again():
    got = segmentation(pixels(1)).compute()
    bins = got["reliability"]
    assert {len(column) for column in bins.values()} == {15}
    assert sum(bins["count"]) == got["pixels"]
    gaps = [n * abs(a - c) for n, a, c in zip(bins["count"], bins["accuracy"], bins["confidence"], strict=True) if n]
    assert sum(gaps) / got["pixels"] == pytest.approx(got["ece"])
    for k, (n, c) in enumerate(zip(bins["count"], bins["confidence"], strict=True)):
        assert c is None if n == 0 else k / 15 - 1e-6 < c <= (k + 1) / 15 + 1e-6


def _big(seed: int, sharpness: float, classes: int = CLASSES) -> tuple[torch.Tensor, torch.Tensor]:
    """(C, 80, 90) and its labels, that follow the probabilities at half the sharpness: over-confident."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(classes, 80, 90, generator=generator)
    true = (logits * sharpness / 2).softmax(0).flatten(1).T
    target = true.multinomial(1, generator=generator).reshape(80, 90).to(torch.uint8)
    return (logits * sharpness).softmax(0), target


@pytest.mark.parametrize(("classes", "sharpness"), [(2, 1.0), (2, 6.0), (4, 3.0), (20, 12.0)])
def test_figures_equal_torchmetrics(classes, sharpness):
    functional = pytest.importorskip("torchmetrics.functional.classification")
    p, target = _big(0, sharpness, classes)
    metric = SegmentationMetric(classes)
    metric.update(p, target)
    got = metric.compute()
    truth, rows = target.flatten().long(), p.flatten(1).T
    said, options = rows.argmax(1), {"num_classes": classes}
    wrong = (said != truth).int()
    doubt = torch.special.entr(rows).sum(1) / math.log(classes)
    assert got["iou"] == pytest.approx(
        functional.multiclass_jaccard_index(said, truth, **options, average=None).tolist()
    )
    assert got["dice"] == pytest.approx(float(functional.multiclass_f1_score(said, truth, **options)), abs=1e-6)
    assert got["accuracy"] == pytest.approx(float((said == truth).float().mean()))
    assert got["confusion"] == functional.multiclass_confusion_matrix(said, truth, **options).tolist()
    ece = functional.multiclass_calibration_error(rows, truth, **options, n_bins=15)
    assert got["ece"] == pytest.approx(float(ece), abs=1e-5)
    assert got["auroc_error"] == pytest.approx(float(functional.binary_auroc(doubt, wrong)), abs=1e-3)
    assert got["aupr_error"] == pytest.approx(float(functional.binary_average_precision(doubt, wrong)), abs=1e-3)


@pytest.mark.parametrize(("classes", "sharpness"), [(2, 6.0), (4, 3.0), (20, 12.0)])
def test_figures_equal_torch_uncertainty(classes, sharpness):
    theirs = _torch_uncertainty()
    p, target = _big(1, sharpness, classes)
    metric = SegmentationMetric(classes)
    metric.update(p, target)
    got = metric.compute()
    rows, truth = p.flatten(1).T, target.flatten().long()
    measures = {
        "nll": theirs.CategoricalNLL(),
        "brier": theirs.BrierScore(num_classes=classes),
        "ece_classwise": theirs.ClasswiseCalibrationError(num_classes=classes, num_bins=15),
    }
    for name, measure in measures.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            measure.update(rows, truth)
            assert got[name] == pytest.approx(float(measure.compute()), abs=1e-5), name
    if classes == 2:
        # Theirs ranks by the highest probability, which for two classes is the order of the entropy.
        area = theirs.AURC()
        area.update(rows, truth)
        assert got["aurc"] == pytest.approx(float(area.compute()), abs=1e-3)


def test_risk_coverage_of_pixels_is_near_the_exact_one():
    p, target = _big(2, 4.0)
    metric = SegmentationMetric(CLASSES)
    metric.update(p, target)
    got = metric.compute()
    doubt = torch.special.entr(p.double()).sum(0).flatten().numpy()
    wrong = (p.max(0).indices != target).flatten().numpy()[np.argsort(doubt)]
    ranks = np.arange(1, len(wrong) + 1)
    area, oracle = (np.mean(np.cumsum(each) / ranks) for each in (wrong, np.sort(wrong)))
    assert got["aurc"] == pytest.approx(area, abs=2e-4)
    assert got["eaurc"] == pytest.approx(area - oracle, abs=2e-4)
    assert 0.01 < oracle < area < wrong.mean()


def test_entropy_bins_keep_the_order_and_64_steps_an_octave_from_either_end():
    values = torch.cat([torch.logspace(-14, 0, 9000), 1 - torch.logspace(-9, -0.1, 9000), torch.tensor([0.0, 1.0])])
    values = values.sort().values
    bins = entropy_bins(values)
    assert (bins.diff() >= 0).all()
    assert (int(bins.min()), int(bins.max())) == (0, ENTROPY_BINS - 1)
    for near, floor in ((values, 2**-40), (1 - values, 2**-22)):
        inside = (near > floor) & (near <= 0.5)
        for k in bins[inside].unique():
            one = near[inside & (bins == k)]
            assert one.max() / one.min() <= 1 + 1 / 64
    odd = entropy_bins(torch.tensor([-1e-9, 1.0000001, math.nan]))
    assert odd[:2].tolist() == [0, ENTROPY_BINS - 1]
    assert 0 <= odd[2] < ENTROPY_BINS


def _eroded_bands(labels: np.ndarray, void: np.ndarray, distance: int, classes: int) -> np.ndarray:
    """Class by class: what so many 3x3 erosions of mask and void remove, zero beyond the edge."""
    out = np.zeros(labels.shape, bool)
    for c in range(classes):
        mask = (labels == c) & ~void
        kept = ndimage.binary_erosion(mask | void, np.ones((3, 3)), iterations=distance, border_value=0)
        out |= mask & ~kept
    return out


@pytest.mark.parametrize("shape", [(1, 1), (3, 90), (40, 60), (130, 200)])
@pytest.mark.parametrize("void", [0.0, 0.02])
def test_bands_equal_the_erosion_of_each_class(shape, void):
    rng = np.random.default_rng(shape[0])
    coarse = rng.integers(0, CLASSES, [1 + side // 12 for side in shape])
    labels = np.kron(coarse, np.ones((12, 12), int))[: shape[0], : shape[1]].astype(np.uint8)
    empty = rng.random(shape) < void
    labels[empty] = VOID
    distance = max(1, round(BOUNDARY * math.hypot(*shape)))
    got = boundary_bands(torch.from_numpy(labels)[None], torch.from_numpy(~empty))[0].numpy()
    wanted = _eroded_bands(labels, empty, distance, CLASSES)
    assert np.array_equal(got & ~empty, wanted)
    assert wanted.any()


def test_boundary_iou_equals_the_definition():
    items, inter, union = [], np.zeros(CLASSES), np.zeros(CLASSES)
    for n in range(3):
        p, target = _big(n, 8.0)
        p = torch.nn.functional.avg_pool2d(p, 9, 1, 4, count_include_pad=False)
        target = p.roll(n + 1, 2).max(0).indices.to(torch.uint8)
        target[:9, 20:40] = VOID
        items.append((p, target, str(n), math.nan))
        truth, void = target.numpy(), (target == VOID).numpy()
        said = p.max(0).indices.numpy()
        near = [_eroded_bands(each, void, round(0.02 * math.hypot(80, 90)), CLASSES) for each in (truth, said)]
        for c in range(CLASSES):
            a, b = near[0] & (truth == c), near[1] & (said == c) & ~void
            inter[c] += (a & b).sum()
            union[c] += (a | b).sum()
    got = segmentation(items).compute()
    assert got["boundary_iou_per_class"] == pytest.approx((inter / union).tolist())
    assert got["boundary_iou"] == pytest.approx((inter / union)[:BACKGROUND].mean())
    assert got["boundary_iou"] < np.mean(got["iou"][:BACKGROUND])


def test_a_perfect_answer_has_no_fault_and_what_is_void_changes_nothing():
    target = torch.zeros(40, 50, dtype=torch.uint8)
    target[10:30, 5:30], target[20:, 20:], target[12:18] = 1, 3, VOID
    p = torch.nn.functional.one_hot(target.long().clamp(max=3), 4).permute(2, 0, 1).float()
    p[:, target == VOID] = torch.rand(4, int((target == VOID).sum())).softmax(0)
    got = segmentation([(p, target, "a", 0.5)]).compute()
    assert got["boundary_iou_per_class"] == [1, 1, None, 1]
    assert (got["boundary_iou"], got["miou"], got["nll"], got["ece"], got["aurc"], got["eaurc"]) == (1, 1, 0, 0, 0, 0)
    assert got["auroc_error"] is got["aupr_error"] is None
    assert got["aurc_image"] == 0


def test_a_class_in_neither_truth_nor_prediction_has_no_iou():
    p = torch.zeros(CLASSES, 2, 2)
    p[1] = 1
    metric = SegmentationMetric(CLASSES)
    metric.update(p, torch.tensor([[1, 1], [0, VOID]], dtype=torch.uint8))
    got = metric.compute()
    assert got["iou"] == [0, pytest.approx(2 / 3), None, None]
    assert got["miou"] == pytest.approx(1 / 3)
    assert got["pixels"] == 3


def test_calibration_error_of_known_confidence_and_accuracy():
    p = torch.full((2, 1, 10), 0.7)
    p[1] = 0.3
    target = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1, 1]], dtype=torch.uint8)
    metric = SegmentationMetric(2)
    metric.update(p, target)
    got = metric.compute()
    assert (got["ece"], got["ece_classwise"]) == (pytest.approx(0.3), pytest.approx(0.3))
    assert got["brier"] == pytest.approx(0.4 * 0.18 + 0.6 * 0.98)
    # All pixels are tied.
    assert (got["auroc_error"], got["aurc"]) == (0.5, pytest.approx(0.6))


@settings(max_examples=20)
@given(st.integers(0, 2**31), st.integers(2, 5), st.sampled_from([0.1, 1.0, 10.0, 60.0]))
def test_the_pool_is_never_worse_than_its_mean_member_in_nll_and_brier(seed, members, sharpness):
    each = [pixels(seed + m, 2, sharpness) for m in range(members)]

    def figures(maps: list[torch.Tensor]) -> dict:
        return segmentation([(p, *item[1:]) for p, item in zip(maps, each[0], strict=True)]).compute()

    alone = [figures([p for p, *_ in member]) for member in each]
    pooled = figures([torch.stack([member[n][0] for member in each]).mean(0) for n in range(2)])
    for name in ("nll", "brier"):
        assert pooled[name] <= np.mean([one[name] for one in alone]) * (1 + 1e-6) + 1e-9
