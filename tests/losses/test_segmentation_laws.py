"""Laws that every loss of dense labels keeps, whatever its head: void, sharding, precision, order, gradients."""

import pytest
import torch

from pipeline.errors import InputError
from pipeline.losses import LOSSES, binary_logit, categorical, total
from pipeline.schema import VOID
from tests.support.loss_cases import CASES, TWO_CLASSES, generator, scene, truth_logits, variants

HALF = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize(("name", "channels"), CASES)
def test_perfect_is_near_zero_and_worse_is_more(name, channels):
    _, target = scene(channels=channels)
    value = [float(LOSSES[name](truth_logits(target, channels, scale), target)[0]) for scale in (30.0, 3.0, 0.0, -3.0)]
    assert 0 <= value[0] < 1e-3
    assert value == sorted(value)
    assert 0.01 + value[1] < value[2] < value[3] - 0.01


@pytest.mark.parametrize(("name", "channels"), CASES)
def test_no_pixel_is_punished_for_being_surer_of_the_truth(name, channels):
    logits, target = scene(channels=channels)
    towards = truth_logits(target, channels, 1.0)
    for settings in variants(name):
        if "smoothing" in settings:
            continue
        leaf = logits.clone().requires_grad_()
        LOSSES[name](leaf, target, **settings)[0].backward()
        assert leaf.grad is not None
        assert ((leaf.grad * towards).sum(1) <= 1e-7).all()
        assert (leaf.grad != 0).any()


@pytest.mark.parametrize(("name", "channels"), CASES)
def test_void_pixels_change_nothing(name, channels):
    logits, target = scene(channels=channels)
    other = torch.where((target == VOID)[:, None], torch.randn(logits.shape, generator=generator(5)) * 9, logits)
    for settings in variants(name):
        leaf = logits.clone().requires_grad_()
        first, second = LOSSES[name](leaf, target, **settings), LOSSES[name](other, target, **settings)
        torch.testing.assert_close(first, second)
        first[0].backward()
        assert leaf.grad is not None
        assert (leaf.grad.movedim(1, -1)[target == VOID] == 0).all()
        assert (leaf.grad.movedim(1, -1)[target != VOID] != 0).any()


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize(("name", "channels"), CASES)
def test_an_all_void_batch_gives_a_finite_zero_with_gradient(name, channels, dtype):
    target = torch.full((2, 8, 8), VOID, dtype=torch.uint8)
    for settings in variants(name):
        logits = (torch.randn(2, channels, 8, 8) * 50).to(dtype).requires_grad_()
        value, count = LOSSES[name](logits, target, **settings)
        loss = total({name: (1.0, value, count)}, {name: count})
        loss.backward()
        assert (value.item(), count.item(), loss.item()) == (0, 0, 0)
        assert logits.grad is not None
        assert (logits.grad == 0).all()


@pytest.mark.parametrize(("name", "channels"), CASES)
def test_counts_need_no_logits(name, channels):
    logits, target = scene(channels=channels)
    wanted = 2.0 if "image" in LOSSES[name].count.__name__ else 2.0 * 6 * 9
    for settings in variants(name):
        value, count = LOSSES[name](logits, target, **settings)
        assert count.item() == LOSSES[name].count(target).item() == wanted
        assert (value.dtype, value.shape, count.dtype, count.shape) == (torch.float32, (), torch.float32, ())


@pytest.mark.parametrize(("name", "channels"), CASES)
def test_shards_sum_to_the_union_however_uneven_their_void(name, channels):
    logits, target = scene(5, channels)
    target[1, :7] = VOID
    for settings in variants(name):
        if settings.get("per") == "batch":
            continue
        gradients = []
        for shards in ([slice(0, 5)], [slice(0, 2), slice(2, 5)], [slice(4, 5), slice(0, 1), slice(1, 4)]):
            leaf, world = logits.clone().requires_grad_(), len(shards)
            parts = [LOSSES[name](leaf[shard], target[shard], **settings) for shard in shards]
            count = torch.stack([part[1] for part in parts]).sum()
            losses = [total({name: (1.5, *part)}, {name: count}, world_size=world) for part in parts]
            (torch.stack(losses).sum() / world).backward()
            gradients.append(leaf.grad)
        for gradient in gradients[1:]:
            torch.testing.assert_close(gradient, gradients[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_one_channel_is_two_with_the_second_at_zero(name):
    z, target = scene(channels=1)
    shift = torch.randn(z.shape, generator=generator(1))
    for settings in variants(name):
        leaf = z.clone().requires_grad_()
        one = LOSSES[name](leaf, target, **settings)
        two = LOSSES[name](torch.cat([z + shift, shift], 1), target, **settings)
        torch.testing.assert_close(one, two)
        one[0].backward()
        pair = torch.cat([z, torch.zeros_like(z)], 1).requires_grad_()
        LOSSES[name](pair, target, **settings)[0].backward()
        assert pair.grad is not None
        torch.testing.assert_close(leaf.grad, pair.grad[:, :1])


def test_heads_by_hand():
    z = torch.tensor([[[[2.0, -1.0]]]])
    torch.testing.assert_close(
        categorical(z).softmax(1)[0, :, 0], torch.stack([z.sigmoid(), 1 - z.sigmoid()]).view(2, 2)
    )
    assert categorical(torch.ones(2, 3, 1, 1)).shape == (2, 3, 1, 1)
    assert binary_logit(z, "a", "b").tolist() == [[[2.0, -1.0]]]
    assert binary_logit(torch.cat([z, z * 3], 1), "a", "b").tolist() == [[[-4.0, 2.0]]]


@pytest.mark.parametrize(("name", "channels"), CASES)
def test_the_order_of_pixels_and_images_is_nothing_to_them(name, channels):
    logits, target = scene(channels=channels)
    pixels, images = torch.randperm(72, generator=generator(2)), torch.tensor([2, 0, 1])
    for settings in variants(name):
        if "boundary" in settings:
            continue
        wanted = LOSSES[name](logits, target, **settings)
        moved = logits.flatten(2)[images][..., pixels].view_as(logits)
        found = LOSSES[name](moved, target.flatten(1)[images][:, pixels].view_as(target), **settings)
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in TWO_CLASSES])
def test_the_order_of_classes_is_nothing_to_them(name):
    logits, target = scene()
    order = torch.tensor([2, 0, 3, 1])
    renamed = order.argsort().to(torch.uint8)[target.clamp(max=3).long()].masked_fill(target == VOID, VOID)
    torch.testing.assert_close(LOSSES[name](logits[:, order], renamed), LOSSES[name](logits, target))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_sums_do_not_overflow(name, dtype):
    # 512 x 512 pixels of a loss near 20: the plain sum is 5e6, beyond float16.
    target = torch.zeros(1, 512, 512, dtype=torch.uint8)
    logits = torch.zeros(1, 2, 512, 512, dtype=dtype)
    logits[:, 1] = 20.0
    logits.requires_grad_()
    value, count = LOSSES[name](logits, target)
    (value / count).backward()
    assert value.dtype == torch.float32
    assert value.isfinite()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("name", "channels"), CASES)
def test_half_precision_and_autocast_compute_in_float32(name, channels, dtype):
    logits, target = scene(channels=channels)
    half = logits.to(dtype)
    for settings in variants(name):
        wanted = LOSSES[name](half.float(), target, **settings)
        with torch.autocast("cpu", torch.bfloat16):
            cast = LOSSES[name](half.float(), target, **settings)
        for found in (LOSSES[name](half, target, **settings), cast):
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("name", "channels"), CASES)
def test_extreme_logits_stay_finite(name, channels):
    signs, target = scene(channels=channels)
    for settings in variants(name):
        for scale, dtype in ((6e4, torch.float16), (1e30, torch.float32), (0.0, torch.float32)):
            leaf = (signs.sign() * scale).to(dtype).requires_grad_()
            value, _ = LOSSES[name](leaf, target, **settings)
            value.backward()
            assert value.isfinite()
            assert value >= 0
            assert leaf.grad is not None
            assert leaf.grad.isfinite().all()


@pytest.mark.parametrize(("name", "channels"), CASES)
def test_an_answer_that_can_not_be_mended_is_left_alone(name, channels):
    _, target = scene(channels=channels)
    for settings in variants(name):
        if "smoothing" in settings:
            continue
        leaf = truth_logits(target, channels, 1e4).requires_grad_()
        value, count = LOSSES[name](leaf, target, **settings)
        value.backward()
        assert 0 <= value.item() / count.item() < 1e-3
        assert leaf.grad is not None
        assert leaf.grad.abs().max() < 1e-4


@pytest.mark.parametrize(("name", "channels"), [case for case in CASES if case[1] != 2])
def test_gradients_are_those_of_finite_differences(name, channels):
    logits, target = scene(2, channels, torch.float64)
    logits, target = logits[:, :, :3, :3].clone().requires_grad_(), target[:, :3, :3].contiguous()
    for settings in variants(name):
        assert torch.autograd.gradcheck(lambda x, s=settings: LOSSES[name](x, target, **s)[0], logits)


@pytest.mark.parametrize("name", TWO_CLASSES)
def test_losses_of_two_classes_refuse_more(name):
    with pytest.raises(InputError, match=rf"loss.{name}: wanted logits of two classes, found 4 channels; use \w+"):
        LOSSES[name](*scene())


@pytest.mark.parametrize(
    ("name", "settings", "text"),
    [
        (
            "cross_entropy",
            {"weights": (1.0, 2.0)},
            r"weights: wanted one number for each of 4 classes, found \(1.0, 2.0\)",
        ),
        ("cross_entropy", {"weights": (1.0, 2.0, -1, 0)}, r"weights\[2\]: wanted a number of at least 0, found -1"),
        ("focal", {"weights": "even"}, "weights: wanted one number for each of 4 classes, found 'even'"),
        ("cross_entropy", {"smoothing": 1.5}, "smoothing: wanted a number from 0 to 1, found 1.5"),
        ("cross_entropy", {"boundary": float("nan")}, "boundary: wanted a number of at least 0, found nan"),
        ("cross_entropy", {"boundary_width": 50}, "boundary_width: wanted a number from 0.2 to 20, found 50"),
        ("focal", {"gamma": "two"}, "gamma: wanted a number of at least 0, found 'two'"),
        ("dice", {"smooth": True}, "smooth: wanted a number of at least 0, found True"),
        ("dice", {"skip": (4,)}, r"skip: wanted a list of labels from 0 to 3, found \(4,\)"),
        ("jaccard", {"skip": 0}, "skip: wanted a list of labels from 0 to 3, found 0"),
        ("lovasz", {"skip": (0, 1, 2, 3)}, "skip: wanted at least one class to be left, found all"),
        ("tversky", {"per": "pixel"}, "per: wanted image or batch, found 'pixel'"),
    ],
)
def test_wrong_settings_are_errors_that_name_them(name, settings, text):
    with pytest.raises(InputError, match=rf"^loss.{name}.{text}"):
        LOSSES[name](*scene(), **settings)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("name", "channels"), CASES)
def test_a_gpu_gives_the_same_and_is_never_waited_for(name, channels):
    logits, target = scene(channels=channels)
    there = logits.cuda(), target.cuda()
    for settings in [*variants(name), {"weights": (1.0, 2.0, 3.0, 4.0)[: max(2, channels)]}]:
        if "weights" in settings and name not in ("cross_entropy", "focal"):
            continue
        LOSSES[name](*there, **settings)  # the one copy of the weights
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = LOSSES[name](*there, **settings)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.testing.assert_close([each.cpu() for each in found], list(LOSSES[name](logits, target, **settings)))
