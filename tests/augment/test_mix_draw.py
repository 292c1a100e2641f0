"""When mosaic and mix-up happen, how, and with whom: laws of their draw, and their settings."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy import stats

from pipeline.augment import Augment, AugmentSettings, draw_mix_partners
from pipeline.config import parse_sets
from pipeline.errors import InputError
from tests.support.augment_cases import make_batch, rows


def test_nothing_is_mixed_at_the_end_of_the_run_nor_alone():
    batch, input = make_batch(4)
    batch.masks = None
    wanted = AugmentSettings(mosaic=1.0, mixup=1.0, mix_close=1.5)
    plain = Augment(AugmentSettings(), input)(batch)
    for epochs, last in ((None, 99), (5, 3), (3.0, 1), (1, -1)):
        augment = Augment(wanted, input, epochs=epochs)
        for epoch in (0, 1, 2, 3, 4, 99):
            before = augment.report()["mixed"]
            out = augment(dataclasses.replace(batch, epochs=torch.full((4,), epoch)))
            mixed = epoch <= last
            added = {name: count - before[name] for name, count in augment.report()["mixed"].items()}
            assert added == ({"mosaic": 4, "mixup": 4} if mixed else {"mosaic": 0, "mixup": 0})
            assert torch.equal(out.images, plain.images) == (not mixed)
    single = Augment(wanted, input)
    assert torch.equal(single(rows(batch, [2])).images, plain.images[[2]])
    assert single.report()["mixed"] == {"mosaic": 0, "mixup": 0}


def test_laws_of_the_draw():
    count = 600
    wanted = AugmentSettings(mosaic=0.3, mixup=0.6, mosaic_centre=(0.1, 0.7), mixup_alpha=3.0)
    drawn = draw_mix_partners(wanted, 0, np.zeros(count), np.arange(count))
    own, at = np.arange(count), drawn["place"]
    assert (drawn["sources"][own, at] == own).all()
    assert all(len(set(each)) == 4 for each in drawn["sources"].tolist())
    assert (drawn["partner"] != own).all()
    assert drawn["mosaic"].mean() == pytest.approx(0.3, abs=0.06)
    assert drawn["mixup"].mean() == pytest.approx(0.6, abs=0.06)
    assert np.bincount(at) / count == pytest.approx([0.25] * 4, abs=0.05)
    assert stats.kstest(drawn["ratio"], stats.beta(3, 3).cdf).pvalue > 0.01
    for axis in (0, 1):
        assert stats.kstest(drawn["centre"][:, axis], stats.uniform(0.1, 0.6).cdf).pvalue > 0.01
    chosen = np.bincount(drawn["partner"], minlength=count)
    assert chosen.var() == pytest.approx(1, abs=0.2), "each row is as likely a partner as any other"
    # A row that leaves changes only those who had it.
    fewer = draw_mix_partners(wanted, 0, np.zeros(count - 1), own[:-1])
    had = drawn["partner"][:-1] == count - 1
    assert (fewer["partner"][~had] == drawn["partner"][:-1][~had]).all()
    had = (drawn["sources"][:-1] == count - 1).any(1)
    assert (fewer["sources"][~had] == drawn["sources"][:-1][~had]).all()


def test_draws_of_mixtures_never_change_between_versions():
    """A resumed run must go on with the same parameters: these values are part of the contract."""
    drawn = draw_mix_partners(AugmentSettings(mosaic=0.5, mixup=0.5), 1, [0, 0, 3, 3, 3], [5, 6, 7, 8, 2**40])
    assert {name: values.tolist() for name, values in drawn.items() if name not in ("centre", "ratio")} == CHOICES
    assert drawn["centre"][:2].tolist() == [pytest.approx(each) for each in CENTRES]
    assert drawn["ratio"].tolist() == pytest.approx(RATIOS)


CHOICES = {
    "mosaic": [True, True, False, True, True],
    "sources": [[4, 1, 3, 0], [2, 1, 4, 0], [4, 0, 2, 1], [3, 4, 2, 1], [1, 4, 3, 2]],
    "place": [3, 1, 2, 0, 1],
    "mixup": [True, True, True, True, False],
    "partner": [2, 2, 4, 2, 1],
}
CENTRES = [[0.22654256075155463, 0.6197018344414917], [0.2037012691836703, 0.5048338676727774]]
RATIOS = [0.2436401641828898, 0.5003641436840349, 0.4843973206050271, 0.6344469236776182, 0.493373000103644]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mosaic=2", "less than or equal to 1"),
        ("mosaic_centre=[0.8, 0.2]", "two rising numbers"),
        ("mosaic_centre=[0.5, 1.5]", "two rising numbers"),
        ("mixup_alpha=0", "greater than 0"),
        ("mix_close=-1", "greater than or equal to 0"),
        ("mosiac=0.5", "Did you mean 'mosaic'"),
    ],
)
def test_wrong_settings_say_what_was_wanted(text: str, message: str):
    with pytest.raises(InputError, match=message):
        AugmentSettings.parse(parse_sets([text]), "augment")
