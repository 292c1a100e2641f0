"""Losses of dense labels against closed forms and other people's code, where that is right."""

import math

import kornia
import numpy as np
import pytest
import segmentation_models_pytorch.losses as smp
import torch
from scipy.ndimage import distance_transform_edt
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

from pipeline.losses import LOSSES
from pipeline.losses.pixel import boundary_weights, class_distance
from pipeline.losses.region import _lovasz_slopes
from pipeline.schema import VOID
from tests.support.loss_cases import generator, scene


def mean(name: str, logits: torch.Tensor, target: torch.Tensor, **settings) -> torch.Tensor:
    value, count = LOSSES[name](logits, target, **settings)
    return value / count


def full_scene(n: int = 3, channels: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """No void, and every class in every image."""
    target = torch.randint(0, max(2, channels), (n, 8, 9), generator=generator(), dtype=torch.uint8)
    return torch.randn(n, channels, 8, 9, generator=generator(1)), target


# --- pixels


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weights", [None, (0.5, 1.0, 2.0, 0.0)])
def test_cross_entropy_is_torchs(weights, smoothing):
    logits, target = scene()
    weight = None if weights is None else torch.tensor(weights)
    wanted = F.cross_entropy(
        logits, target.long(), weight, ignore_index=VOID, reduction="sum", label_smoothing=smoothing
    )
    value, count = LOSSES["cross_entropy"](logits, target, weights=weights, smoothing=smoothing)
    torch.testing.assert_close(value, wanted)
    assert count.item() == 2 * 6 * 9


def test_class_weights_scale_the_pixels_of_their_class():
    logits, target = scene()
    weights = [0.5, 1.0, 2.0, 0.0]
    for name in ("cross_entropy", "focal"):
        parts = [torch.where(target == c, target, torch.full_like(target, VOID)) for c in range(4)]
        each = [LOSSES[name](logits, part)[0] for part in parts]
        wanted = sum(w * value.item() for w, value in zip(weights, each, strict=True))
        assert LOSSES[name](logits, target, weights=weights)[0].item() == pytest.approx(wanted, rel=1e-5)


def test_class_weights_first_asked_for_without_gradients_can_be_used_with_them():
    logits, target = scene()
    settings = {"weights": (0.25, 0.5, 0.75, 1.0)}
    with torch.inference_mode():
        LOSSES["cross_entropy"](logits, target, **settings)
    LOSSES["cross_entropy"](logits.requires_grad_(), target, **settings)[0].backward()
    assert logits.grad is not None


@pytest.mark.parametrize("channels", [1, 2])
def test_binary_cross_entropy_is_torchs_and_the_categorical_one(channels):
    logits, target = scene(channels=channels)
    z = logits[:, 0] - (logits[:, 1] if channels == 2 else 0)
    known = target != VOID
    for smoothing in (0.0, 0.1):
        truth = (target == 0).float() * (1 - smoothing) + smoothing / 2
        wanted = F.binary_cross_entropy_with_logits(
            z[known], truth[known], pos_weight=torch.tensor(3.0), reduction="sum"
        )
        value, _ = LOSSES["binary_cross_entropy"](logits, target, positive_weight=3.0, smoothing=smoothing)
        torch.testing.assert_close(value, wanted)
        other, _ = LOSSES["cross_entropy"](logits, target, weights=(3.0, 1.0), smoothing=smoothing)
        torch.testing.assert_close(value, other)


def test_focal_follows_its_formula_and_is_cross_entropy_at_gamma_0():
    logits, target = scene()
    plain, _ = LOSSES["cross_entropy"](logits, target)
    torch.testing.assert_close(LOSSES["focal"](logits, target, gamma=0.0)[0], plain)
    one = torch.tensor([[0.0, math.log(3.0)]])[:, :, None, None]
    value = mean("focal", one, torch.ones(1, 1, 1, dtype=torch.uint8), gamma=2.0)
    assert value.item() == pytest.approx(-(0.25**2) * math.log(0.75), rel=1e-5)


def test_focal_is_kornias():
    logits, target = full_scene()
    # Its alpha is the weight of the classes but the first, which gets 1 - alpha: at 1/2 both get half.
    wanted = kornia.losses.focal_loss(logits, target.long(), alpha=0.5, gamma=1.5, reduction="sum")
    torch.testing.assert_close(LOSSES["focal"](logits, target, gamma=1.5)[0] / 2, wanted)


@pytest.mark.parametrize("alpha", [None, 0.25])
def test_binary_focal_is_torchvisions_and_without_alpha_the_categorical_one(alpha):
    z, target = scene(channels=1)
    known = target != VOID
    wanted = sigmoid_focal_loss(
        z[:, 0][known], (target == 0).float()[known], alpha=-1 if alpha is None else alpha, gamma=1.5, reduction="sum"
    )
    torch.testing.assert_close(LOSSES["binary_focal"](z, target, gamma=1.5, alpha=alpha)[0], wanted)
    if alpha is None:
        torch.testing.assert_close(LOSSES["focal"](z, target, gamma=1.5)[0], wanted)


# --- boundaries


def brute_distance(target: np.ndarray, label: int) -> np.ndarray:
    """Euclidean distance of every pixel to the nearest that is of another class than ``label``, and not void."""
    other = (target != label) & (target != VOID)
    return np.asarray(distance_transform_edt(~other)) if other.any() else np.full(target.shape, np.inf)


def test_distances_are_near_the_euclidean_ones():
    blocks = torch.randint(0, 3, (2, 4, 5), generator=generator(3), dtype=torch.uint8)
    target = blocks.repeat_interleave(11, 1).repeat_interleave(9, 2)
    target[:, 7:16] = VOID
    target[1, :, 20:22] = VOID
    found = class_distance(target, 8)
    for image, distance in zip(target.numpy(), found.float().numpy(), strict=True):
        for label in range(3):
            wanted = brute_distance(image, label)
            mine = (image == label) & (distance <= 8)
            assert mine.any()
            assert np.abs(distance - wanted)[mine].max() < 1
            # What is out of reach is so by any measure.
            assert (wanted[(image == label) & (distance > 8)] > 7.9).all()


def test_distances_by_hand():
    row = torch.tensor([[[0, 0, 0, VOID, 1, 1, VOID, VOID, VOID, 1, 0]]], dtype=torch.uint8)
    known = row[0, 0] != VOID
    assert class_distance(row, 9)[0, 0][known].tolist() == [4, 3, 2, 2, 3, 1, 1]
    assert class_distance(row, 2)[0, 0][known].tolist() == [3, 3, 2, 2, 3, 1, 1]
    alone = torch.full((1, 3, 4), 5, dtype=torch.uint8)
    assert (class_distance(alone, 4) == 5).all()
    assert (class_distance(torch.full_like(alone, VOID), 4) == 5).all()
    assert class_distance(torch.tensor([[[254], [0]]], dtype=torch.uint8), 3).flatten().tolist() == [1, 1]


def test_pixels_at_a_boundary_weigh_more():
    target = torch.zeros(1, 5, 40, dtype=torch.uint8)
    target[..., 20:] = 1
    weights = boundary_weights(target, 4.0, 2.0)[0]
    assert (weights == weights[0]).all()
    distance = torch.tensor([20 - x if x < 20 else x - 19 for x in range(40)])
    wanted = 1 + 4 * torch.exp(-(distance**2) / 8.0) * (distance <= 6)
    torch.testing.assert_close(weights[0], wanted)
    logits = torch.randn(1, 2, 5, 40, generator=generator())
    each = F.cross_entropy(logits, target.long(), reduction="none")
    for name in ("cross_entropy", "binary_cross_entropy"):
        value, count = LOSSES[name](logits, target, boundary=4.0, boundary_width=2.0)
        torch.testing.assert_close(value, (each * wanted).sum())
        assert count.item() == 200


# --- regions


def test_dice_by_hand():
    # One image, four pixels, p(class 1) = .25 .75 .75 and a void one; truth 0 1 0.
    p = torch.tensor([0.25, 0.75, 0.75, 0.9])
    logits = torch.stack([(1 - p).log(), p.log()])[None, :, None, :]
    target = torch.tensor([[[0, 1, 0, VOID]]], dtype=torch.uint8)
    value, count = LOSSES["dice"](logits, target, smooth=0.0)
    one = 2 * 0.75 / (1.75 + 1)
    zero = 2 * (0.75 + 0.25) / (1.25 + 2)
    assert count.item() == 1
    assert value.item() == pytest.approx(1 - (one + zero) / 2, rel=1e-5)
    assert LOSSES["dice"](logits, target, smooth=0.0, skip=(0,))[0].item() == pytest.approx(1 - one, rel=1e-5)
    jaccard = 1 - (0.75 / 2 + 1 / 2.25) / 2
    assert LOSSES["jaccard"](logits, target, smooth=0.0)[0].item() == pytest.approx(jaccard, rel=1e-5)
    tversky = (0.75 / (0.75 + 0.3 + 0.7 * 0.25), 1 / (1 + 0.3 * 0.25 + 0.7))
    focal = sum((1 - each) ** 0.75 for each in tversky) / 2
    assert LOSSES["tversky"](logits, target, smooth=0.0, gamma=0.75)[0].item() == pytest.approx(focal, rel=1e-5)


@pytest.mark.parametrize("smooth", [0.0, 1.0])
@pytest.mark.parametrize("per", ["image", "batch"])
def test_region_losses_are_smps(per, smooth):
    logits, target = full_scene()
    target[0, :3] = VOID
    others = {
        # Newer versions of it smooth the half of the quotient's parts, so by twice as much.
        "dice": smp.DiceLoss("multiclass", smooth=0.0, ignore_index=VOID),
        "jaccard": smp.JaccardLoss("multiclass", smooth=smooth, ignore_index=VOID),
        "tversky": smp.TverskyLoss("multiclass", smooth=smooth, alpha=0.2, beta=0.9, ignore_index=VOID),
    }
    for name, other in others.items():
        settings = {"alpha": 0.2, "beta": 0.9} if name == "tversky" else {}
        settings["smooth"] = 0.0 if name == "dice" else smooth
        found = mean(name, logits, target, per=per, **settings)
        parts = zip(logits.split(1), target.split(1), strict=True) if per == "image" else [(logits, target)]
        wanted = torch.stack([other(x, y.long()) for x, y in parts]).mean()
        torch.testing.assert_close(found, wanted)


def test_tversky_is_dice_and_jaccard_at_their_alpha_and_beta():
    logits, target = scene()
    half = LOSSES["tversky"](logits, target, alpha=0.5, beta=0.5, smooth=1.0)
    torch.testing.assert_close(half, LOSSES["dice"](logits, target, smooth=2.0))
    one = LOSSES["tversky"](logits, target, alpha=1, beta=1, smooth=1.0)
    torch.testing.assert_close(one, LOSSES["jaccard"](logits, target, smooth=1.0))


@pytest.mark.parametrize("name", ["dice", "tversky", "jaccard", "lovasz"])
def test_per_batch_is_one_large_image(name):
    logits, target = scene(4)
    value, count = LOSSES[name](logits, target, per="batch")
    wide = (torch.cat(list(each.unbind(0)), -1)[None] for each in (logits, target))
    torch.testing.assert_close(value / count, LOSSES[name](*wide)[0])
    assert count.item() == 3
    single = logits[:1], target[:1]
    torch.testing.assert_close(LOSSES[name](*single, per="batch"), LOSSES[name](*single))


@pytest.mark.parametrize("per", ["image", "batch"])
def test_lovasz_is_smps(per):
    logits, target = scene(3)
    logits, target = logits[:2], target[:2]
    target[0][target[0] == 2] = 1
    other = smp.LovaszLoss("multiclass", per_image=per == "image", ignore_index=VOID)
    leaves = [logits.clone().requires_grad_() for _ in range(2)]
    found, wanted = mean("lovasz", leaves[0], target, per=per), other(leaves[1], target)
    torch.testing.assert_close(found, wanted)
    found.backward()
    wanted.backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)


def test_lovasz_is_kornias_where_every_class_is_present():
    logits, target = full_scene()
    torch.testing.assert_close(mean("lovasz", logits, target), kornia.losses.lovasz_softmax_loss(logits, target.long()))


def test_lovasz_hinge_is_kornias_and_smps():
    z, target = full_scene(channels=1)
    target[2] = 1  # an image without the positive class
    positive = (target == 0).long()
    found = mean("lovasz_hinge", z, target)
    torch.testing.assert_close(found, kornia.losses.lovasz_hinge_loss(z, positive))
    assert LOSSES["lovasz_hinge"](z[2:], target[2:])[0].item() == pytest.approx(1 + z[2].max().item(), rel=1e-6)
    target[0, :3] = VOID
    other = smp.LovaszLoss("binary", per_image=True, ignore_index=VOID)
    positive = positive.masked_fill(target == VOID, VOID)
    torch.testing.assert_close(mean("lovasz_hinge", z, target), other(z, positive))


def test_lovasz_of_hard_answers_is_one_minus_the_iou():
    _, target = full_scene(n=1)
    said = torch.randint(0, 3, target.shape, generator=generator(4))
    logits = F.one_hot(said, 3).movedim(-1, 1) * 1e4
    hits = [((said == c) & (target == c)).sum() / ((said == c) | (target == c)).sum() for c in range(3)]
    torch.testing.assert_close(LOSSES["lovasz"](logits, target)[0], 1 - torch.stack(hits).mean())
    # Hinge errors are 2 where wrong, else 0.
    hinge = LOSSES["lovasz_hinge"](torch.where(said == 0, 1.0, -1.0)[:, None], (target != 0).to(torch.uint8))[0]
    torch.testing.assert_close(hinge, 2 * (1 - hits[0]))


def test_slopes_are_as_exact_in_a_large_image():
    errors = torch.rand(1, 1, 300_000, generator=generator())
    truth = errors.gt(0.3) ^ torch.rand(errors.shape, generator=generator(1)).gt(0.9)
    known = torch.ones_like(truth)
    found = _lovasz_slopes(errors, truth, known, torch.ones(1, 1, dtype=torch.bool))
    order = errors.flatten().argsort(descending=True, stable=True)
    hit = truth.flatten()[order].double()
    jaccard = 1 - (hit.sum() - hit.cumsum(0)) / (hit.sum() + (1 - hit).cumsum(0))
    wanted = torch.diff(jaccard, prepend=torch.zeros(1, dtype=torch.float64))
    torch.testing.assert_close(found.flatten()[order].double(), wanted, rtol=1e-5, atol=1e-12)


def test_classes_that_are_needed_do_not_depend_on_the_others():
    logits, target = scene()
    errors = torch.rand(2, 4, 72, generator=generator())
    truth = (target[:2, None] == torch.arange(4)[:, None, None]).flatten(2)
    known = (target[:2] != VOID).flatten(1)[:, None]
    every = _lovasz_slopes(errors, truth, known, torch.ones(2, 4, dtype=torch.bool))
    some = torch.tensor([[True, False, True, False], [False] * 4])
    torch.testing.assert_close(_lovasz_slopes(errors, truth, known, some), every * some[..., None])
