"""Identities of entropy and mutual information, and every aggregation against a loop over pixels."""

import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.uncertainty import measures


def _members(seed: int, members: int, classes: int, sharpness: float) -> torch.Tensor:
    logits = torch.randn(members, 2, classes, 3, 4, generator=torch.Generator().manual_seed(seed))
    return (logits.double() * sharpness).softmax(2)


@settings(max_examples=50)
@given(st.integers(0, 2**31), st.integers(1, 6), st.integers(2, 6), st.sampled_from([0.1, 1.0, 10.0, 100.0]))
def test_mutual_information_is_the_mean_divergence_from_the_pool(seed, members, classes, sharpness):
    p = _members(seed, members, classes, sharpness)
    pool = p.mean(0)
    total = measures.entropy(pool, 1)
    mutual = measures.mutual_information(total, measures.expected_entropy(p, 2))
    divergence = (torch.special.xlogy(p, p) - torch.special.xlogy(p, pool)).sum(2).mean(0)
    assert (mutual >= 0).all()
    torch.testing.assert_close(mutual, divergence, atol=1e-12, rtol=1e-9)
    assert (total <= math.log(classes) + 1e-5).all()


@pytest.mark.parametrize(("p", "expected"), [([1.0, 0.0], 0.0), ([0.5, 0.5], math.log(2)), ([0.25] * 4, math.log(4))])
def test_entropy_in_closed_form(p, expected):
    assert measures.entropy(torch.tensor(p), 0).item() == pytest.approx(expected, abs=1e-7)


def test_two_sure_members_that_disagree_have_all_doubt_in_the_mutual_information():
    p = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    expected = measures.expected_entropy(p, 1)
    total = measures.entropy(p.mean(0), 0)
    assert expected.item() == 0
    assert measures.mutual_information(total, expected).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("members", [1, 2, 3, 5, 7])
def test_running_mean_equals_the_mean_and_is_exact_for_copies(members):
    values = torch.randn(members, 40, generator=torch.Generator().manual_seed(members))
    running, copies = measures.RunningMean(), measures.RunningMean()
    for each in values:
        running.add(each)
        copies.add(values[0])
    torch.testing.assert_close(running.mean, values.mean(0))
    assert torch.equal(copies.mean, values[0])


def test_running_mean_leaves_its_inputs_alone():
    first, second = torch.zeros(3), torch.ones(3)
    running = measures.RunningMean()
    running.add(first)
    running.add(second)
    assert torch.equal(first, torch.zeros(3))
    with pytest.raises(ValueError, match="no members"):
        _ = measures.RunningMean().mean
    with pytest.raises(ValueError, match="no members"):
        _ = measures.RunningSpread().std


@pytest.mark.parametrize("members", [1, 2, 4])
def test_running_spread_equals_the_weighted_moments(members):
    generator = torch.Generator().manual_seed(members)
    boxes = 500 + torch.randn(members, 9, 4, generator=generator)
    weights = torch.rand(members, 9, generator=generator) + 0.01
    running = measures.RunningSpread()
    for each, weight in zip(boxes, weights, strict=True):
        running.add(each, weight)
    wide, share = boxes.double(), (weights / weights.sum(0)).double()[..., None]
    mean = (wide * share).sum(0)
    std = ((wide - mean) ** 2 * share).sum(0).sqrt()
    torch.testing.assert_close(running.mean.double(), mean, atol=1e-3, rtol=0)
    torch.testing.assert_close(running.std.double(), std, atol=1e-3, rtol=1e-3)


def test_equal_weights_give_the_plain_moments_and_copies_no_spread():
    boxes = torch.tensor([[[10.0, 20, 30, 40]], [[14.0, 20, 30, 44]]])
    running, copies = measures.RunningSpread(), measures.RunningSpread()
    for each in boxes:
        running.add(each, torch.full((1,), 0.3))
        copies.add(boxes[0] + 1 / 3, torch.full((1,), 0.7))
    torch.testing.assert_close(running.mean, torch.tensor([[12.0, 20, 30, 42]]))
    torch.testing.assert_close(running.std, torch.tensor([[2.0, 0, 0, 2]]))
    assert torch.equal(copies.mean, boxes[0] + 1 / 3)
    assert not copies.std.any()


def test_scores_become_a_distribution_whose_rest_is_non_existence():
    p = measures.add_background_class(torch.tensor([[0.8, 0.2, 0.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]]))
    expected = torch.tensor([[0.64, 0.16, 0, 0.2], [0, 0, 0, 1], [1, 0, 0, 0]])
    torch.testing.assert_close(p, expected)
    scores = torch.rand(50, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(measures.add_background_class(scores).sum(-1), torch.ones(50))
    assert torch.equal(measures.add_background_class(scores)[:, :-1].argmax(-1), scores.argmax(-1))


def _frame(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values, labels, and the image's rectangle in a padded frame, of 3 images."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(3, 13, 17, generator=generator)
    labels = (torch.rand(3, 13, 17, generator=generator) * 1.3).long()
    valid = torch.zeros(3, 13, 17, dtype=torch.bool)
    valid[0] = True
    valid[1, 2:11, :] = True
    valid[2, :, 4:9] = True
    return values, labels, valid


def test_means_and_quantiles_look_at_the_image_only():
    values, _, valid = _frame(0)
    means = measures.masked_mean(values, valid)
    for q in (0.0, 0.5, 0.95, 1.0):
        quantiles = measures.masked_quantile(values, valid, q)
        for n in range(3):
            inside = values[n][valid[n]].numpy()
            wanted = np.quantile(inside, q, method="inverted_cdf")
            assert quantiles[n].item() == pytest.approx(float(wanted), abs=0)
            assert means[n].item() == pytest.approx(float(inside.mean()), rel=1e-6)
    assert measures.masked_quantile(values, valid & False, 0.5).isnan().all()
    assert measures.masked_mean(values, valid & False).isnan().all()


@pytest.mark.parametrize("size", [1, 2, 5])
def test_patch_max_equals_the_loop_over_windows(size):
    values, _, valid = _frame(1)
    got = measures.max_patch_mean(values, valid, size)
    for n in range(3):
        means = [
            values[n, y : y + size, x : x + size].mean().item()
            for y, x in itertools.product(range(14 - size), range(18 - size))
            if valid[n, y : y + size, x : x + size].all()
        ]
        assert got[n].item() == pytest.approx(max(means), rel=1e-5)


def test_patch_max_of_an_image_smaller_than_the_window_is_its_mean():
    values, _, valid = _frame(2)
    means = measures.masked_mean(values, valid)
    torch.testing.assert_close(measures.max_patch_mean(values, valid, 30), means)
    # Only the third image, 5 columns wide, holds no window of 9.
    got = measures.max_patch_mean(values, valid, 9)
    assert got[2].item() == pytest.approx(means[2].item())
    assert got[1].item() > means[1].item()


@pytest.mark.parametrize("radius", [0, 1, 2])
def test_inner_equals_the_loop_over_neighbourhoods(radius):
    _, labels, valid = _frame(3)
    got = measures.interior(labels, valid, radius)
    for n, y, x in itertools.product(range(3), range(13), range(17)):
        rows, columns = (slice(max(0, at - radius), at + radius + 1) for at in (y, x))
        near = labels[n, rows, columns][valid[n, rows, columns]]
        assert got[n, y, x].item() == (valid[n, y, x].item() and len(near.unique()) == 1)


def test_inner_mean_falls_back_to_the_whole_image():
    values, _, valid = _frame(4)
    checker = torch.arange(13)[:, None].add(torch.arange(17)).remainder(2).expand(3, 13, 17)
    whole = measures.masked_mean(values, valid)
    torch.testing.assert_close(measures.interior_mean(values, checker, valid, 1), whole)
    one_class = torch.zeros(3, 13, 17, dtype=torch.long)
    torch.testing.assert_close(measures.interior_mean(values, one_class, valid, 2), whole)


def _slow_dice(a: np.ndarray, b: np.ndarray, classes: list[int]) -> float:
    shown = [c for c in classes if (a == c).any() or (b == c).any()]
    each = [2 * ((a == c) & (b == c)).sum() / ((a == c).sum() + (b == c).sum()) for c in shown]
    return float(np.mean(each)) if shown else 1.0


@pytest.mark.parametrize(("background", "classes"), [(None, [0, 1, 2]), (2, [0, 1]), (0, [1, 2])])
def test_pairwise_dice_equals_the_loop_over_pairs(background, classes):
    _, _, valid = _frame(5)
    maps = torch.randint(0, 3, (4, 3, 13, 17), generator=torch.Generator().manual_seed(5), dtype=torch.uint8)
    maps[:, 2] = 1
    got = measures.pairwise_dice(list(maps), valid, 3, background)
    for n in range(3):
        inside = [each[n][valid[n]].numpy() for each in maps]
        wanted = np.mean([_slow_dice(a, b, classes) for a, b in itertools.combinations(inside, 2)])
        assert got[n].item() == pytest.approx(float(wanted), rel=1e-9)


def test_dice_of_one_member_and_of_nothing_seen_is_one():
    valid = torch.ones(2, 4, 4, dtype=torch.bool)
    nothing = torch.ones(2, 4, 4, dtype=torch.uint8)
    assert measures.pairwise_dice([nothing], valid, 2, 1).tolist() == [1, 1]
    assert measures.pairwise_dice([nothing, nothing], valid, 2, 1).tolist() == [1, 1]
    assert measures.pairwise_dice([nothing, nothing * 0], valid, 2, 1).tolist() == [0, 0]


def test_class_sums_count_and_add_by_class():
    values, labels, valid = _frame(6)
    areas = measures.class_sums(labels, valid, 3)
    sums = measures.class_sums(labels, valid, 3, values)
    for n, c in itertools.product(range(3), range(3)):
        inside = valid[n] & (labels[n] == c)
        assert areas[n, c].item() == inside.sum().item()
        assert sums[n, c].item() == pytest.approx(values[n][inside].double().sum().item())


def test_entropies_are_those_of_torch_uncertainty():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        metrics = pytest.importorskip("torch_uncertainty.metrics")
    members = torch.randn(5, 200, 4, generator=torch.Generator().manual_seed(0)).mul(2).softmax(-1)
    total = measures.entropy(members.mean(0), -1)
    mutual = measures.mutual_information(total, measures.expected_entropy(members, -1))
    entropy, information = metrics.Entropy(), metrics.MutualInformation()
    entropy.update(members.mean(0))
    information.update(members.transpose(0, 1))
    assert total.mean().item() == pytest.approx(entropy.compute().item(), abs=1e-5)
    assert mutual.mean().item() == pytest.approx(information.compute().item(), abs=1e-5)


@pytest.mark.parametrize("classes", [1, 2, 5, 255])
def test_the_most_probable_class_is_that_of_max(classes: int):
    generator = torch.Generator().manual_seed(classes)
    probabilities = torch.rand(3, classes, 7, 9, generator=generator)
    probabilities[0] = (probabilities[0] * 3).round() / 3  # ties: the first of equals
    largest, labels = measures.most_probable(probabilities)
    assert labels.dtype == torch.uint8
    assert largest.equal(probabilities.amax(1))
    first = (probabilities == largest[:, None]).to(torch.uint8).argmax(1)
    assert labels.long().equal(first)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.95, 1.0])
def test_quantiles_are_those_of_sorting(share: float):
    generator = torch.Generator().manual_seed(3)
    values, mask = torch.rand(4, 11, 13, generator=generator), torch.rand(4, 11, 13, generator=generator) < 0.7
    mask[1], mask[2] = True, False
    found = measures.masked_quantile(values, mask, share)
    for n in (0, 1, 3):
        kept = values[n][mask[n]].sort().values
        assert found[n] == kept[max(1, math.ceil(share * len(kept) - 1e-9)) - 1]
    assert found[2].isnan()


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8])
def test_window_sums_are_those_of_pooling(size: int):
    values = torch.rand(2, 15, 20, generator=torch.Generator().manual_seed(size))
    wanted = torch.nn.functional.avg_pool2d(values[:, None], size, stride=1)[:, 0] * size**2
    assert torch.allclose(measures._window_sum(values, size), wanted, rtol=1e-5)


def test_a_table_of_sums_is_its_columns():
    generator = torch.Generator().manual_seed(5)
    labels = torch.randint(0, 4, (3, 8, 9), generator=generator).to(torch.uint8)
    mask, weight = torch.rand(3, 8, 9, generator=generator) < 0.6, torch.rand(3, 8, 9, generator=generator)
    count, sums = measures.class_table(labels, mask, 4, weight)
    for n in range(3):
        for label in range(4):
            of = mask[n] & (labels[n] == label)
            assert count[n, label] == of.sum()
            assert sums[n, label] == pytest.approx(weight[n][of].double().sum().item(), rel=1e-12)
    assert measures.class_sums(labels, mask, 4, weight).equal(sums)


def test_entropy_of_certainty_is_zero():
    assert measures.entropy(torch.tensor([[1.0, 0.0, 0.0]]), 1).abs().item() == 0
