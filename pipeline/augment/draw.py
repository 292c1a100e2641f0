"""The one draw: every parameter is a pure function of (seed, epoch, position, parameter).

A counter-based hash instead of a generator: the value of a key does not depend on which other keys are asked
for, so parameters change neither with batch size, order, worker count nor restarts. Kornia's own parameter
generators draw whole batches from torch's global state, so they cannot be driven this way; Kornia's classes
are given these parameters and make the matrices. Only with whom a row is mixed depends on its batch.
"""

from typing import Final

import numpy as np
from numpy.typing import ArrayLike

from pipeline.augment.settings import AugmentSettings

# One number a random quantity, for ever: switching one op on or off leaves the draws of all others alone.
_STREAMS: Final = {
    name: index
    for index, name in enumerate(
        [
            "crop_y", "crop_x", "hflip", "vflip", "turn", "turns", "rotate", "translate_x", "translate_y",
            "scale", "shear", "brightness", "contrast", "saturation", "hue", "blur", "blur_sigma", "noise",
            "noise_std", "noise_key", "erase", "erase_area", "erase_aspect", "erase_x", "erase_y",
            "mosaic", "mosaic_partner", "mosaic_place", "mosaic_x", "mosaic_y",
            "mixup", "mixup_partner", "mixup_ratio",
        ]
    )
}  # fmt: skip
_GOLDEN_RATIO: Final = 0x9E3779B97F4A7C15
_MAX_WORD: Final = 2**64 - 1
_STREAM_STEPS: Final = np.array([((index + 1) * _GOLDEN_RATIO) & _MAX_WORD for index in _STREAMS.values()], np.uint64)


def _mix_bits(words: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014, OOPSLA)."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


class _KeyedDraw:
    """Random numbers of N rows: a row's key is (seed, epoch, position), and each stream gives it one number."""

    def __init__(self, seed: int, epochs: ArrayLike, positions: ArrayLike) -> None:
        epochs, positions = (
            np.atleast_1d(np.asarray(epochs, np.int64)),
            np.atleast_1d(np.asarray(positions, np.int64)),
        )
        state = np.zeros(epochs.shape, np.uint64)
        # Mixed after every word: sums of unmixed words would give (seed 8, epoch 0) the draws of (7, 1).
        for word in (
            np.array(seed & _MAX_WORD, np.uint64),
            epochs.astype(np.uint64),
            positions.astype(np.uint64),
        ):
            state = _mix_bits((state ^ word) + np.uint64(_GOLDEN_RATIO))
        self._state = state
        # All streams at once: for the few rows of a batch, numpy's calls cost more than the numbers.
        self._words = _mix_bits(state + _STREAM_STEPS[:, None])
        # The upper 53 bits are what a float64 holds exactly.
        self._units = (self._words >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def word(self, stream: str) -> np.ndarray:
        """(N,) uint64, all 64 bits of the stream's number."""
        return self._words[_STREAMS[stream]]

    def uniform(self, stream: str, low: float = 0.0, high: float = 1.0) -> np.ndarray:
        """(N,) float64 in [low, high)."""
        return low + (high - low) * self._units[_STREAMS[stream]]

    def chosen(self, stream: str, probability: float) -> np.ndarray:
        """(N,) bool, true with the given probability."""
        return self.uniform(stream) < probability

    def other_rows(self, stream: str) -> np.ndarray:
        """(N, N - 1) int64: for each row all other rows in a random order.

        Sorted by a hash of both rows' keys, so that the order in the batch plays no part, and a row that
        comes or goes leaves the order of the others alone (Thaler and Ravishankar 1998, rendezvous hashing).
        """
        words = _mix_bits(self.word(stream)[:, None] ^ self._state[None, :])
        np.fill_diagonal(words, _MAX_WORD)
        order = np.argsort(words, axis=1, kind="stable")
        count = len(words)
        return order[order != np.arange(count)[:, None]].reshape(count, max(count - 1, 0))


def crop_offsets(seed: int, epochs: ArrayLike, positions: ArrayLike) -> np.ndarray:
    """Where the training crop of each image lies: (N, 2) float64 in [0, 1), down and right.

    Args:
        seed: Of the run or member.
        epochs: (N,) epoch of each row.
        positions: (N,) place of each row within its epoch.
    """
    keyed = _KeyedDraw(seed, epochs, positions)
    return np.stack([keyed.uniform("crop_y"), keyed.uniform("crop_x")], -1)


def draw_parameters(
    settings: AugmentSettings, seed: int, epochs: ArrayLike, positions: ArrayLike
) -> dict[str, np.ndarray]:
    """All parameters of N images, each a pure function of its own key.

    Args:
        settings: What may happen and how strongly.
        seed: Of the run or member; members differ by it.
        epochs: (N,) epoch of each row.
        positions: (N,) place of each row within its epoch.

    Returns:
        Arrays of N rows. Geometry: ``hflip``, ``vflip`` (bool), ``turns`` (quarter turns counter-clockwise,
        0 to 3), ``angle`` (degrees, clockwise as displayed), ``translate`` (N, 2: fractions of width and
        height), ``scale``, ``shear`` (degrees). Colour: ``brightness`` (added), ``contrast``, ``saturation``
        (factors), ``hue`` (turns). Effects: ``blur`` (sigma in pixels, 0 = none), ``noise`` (standard
        deviation, 0 = none), ``noise_key`` (32-bit), ``erase`` (N, 4: x1, y1, x2, y2 as fractions of the
        input; all 0 = none).
    """
    keyed = _KeyedDraw(seed, epochs, positions)

    def around(stream: str, centre: float, reach: float) -> np.ndarray:
        return keyed.uniform(stream, centre - reach, centre + reach)

    is_turned = keyed.chosen("turn", settings.quarter_turns)
    sigma = keyed.uniform("blur_sigma", *settings.blur_sigma)
    shift = [around("translate_x", 0, settings.translate), around("translate_y", 0, settings.translate)]
    return {
        "hflip": keyed.chosen("hflip", settings.hflip),
        "vflip": keyed.chosen("vflip", settings.vflip),
        "turns": np.where(is_turned, 1 + np.floor(keyed.uniform("turns", 0, 3)), 0).astype(np.int64),
        "angle": around("rotate", 0, settings.rotate),
        "translate": np.stack(shift, -1),
        "scale": np.exp(keyed.uniform("scale", *np.log(settings.scale))),
        "shear": around("shear", 0, settings.shear),
        "brightness": around("brightness", 0, settings.brightness),
        "contrast": around("contrast", 1, settings.contrast),
        "saturation": around("saturation", 1, settings.saturation),
        "hue": around("hue", 0, settings.hue),
        "blur": np.where(keyed.chosen("blur", settings.blur), sigma, 0),
        "noise": np.where(keyed.chosen("noise", settings.noise), keyed.uniform("noise_std", 0, settings.noise_std), 0),
        "noise_key": (keyed.word("noise_key") >> np.uint64(32)).astype(np.int64),
        "erase": _erase_rectangles(settings, keyed),
    }


def draw_mix_partners(
    settings: AugmentSettings, seed: int, epochs: ArrayLike, positions: ArrayLike, mix_until: float = np.inf
) -> dict[str, np.ndarray]:
    """Which of N rows are mixed, how, and with which other rows of these N.

    Whether and how is a pure function of the row's own key; with whom, of the keys of all N rows.

    Args:
        settings: How often, and how.
        seed: Of the run or member.
        epochs: (N,) epoch of each row.
        positions: (N,) place of each row within its epoch.
        mix_until: Rows of this epoch and later are not mixed.

    Returns:
        Arrays of N rows: ``mosaic`` (bool), ``sources`` (N, 4: the rows seen top left, top right, bottom left,
        bottom right), ``place`` (which of the four is the row itself), ``centre`` (N, 2: where they meet, as
        fractions of width and height); ``mixup`` (bool), ``partner`` (row), ``ratio`` (share of the row itself).
    """
    from scipy.special import betaincinv  # here, since scipy is slow to import

    keyed = _KeyedDraw(seed, epochs, positions)
    count = len(np.atleast_1d(epochs))
    # Rows near the end of the run, and a batch of one, are left alone.
    may_mix = (np.atleast_1d(epochs) < mix_until) & (count > 1)
    row_numbers = np.arange(count)
    sources, partner = np.repeat(row_numbers[:, None], 4, 1), row_numbers
    # Each row takes each of the four places equally often, so that all parts of an image are seen equally often.
    own_quadrant = np.floor(keyed.uniform("mosaic_place", 0, 4)).astype(np.int64)
    if count > 1:
        other_rows = keyed.other_rows("mosaic_partner")
        # The row itself and three others; a batch of fewer than four shows an image twice.
        shown_rows = np.concatenate([row_numbers[:, None], other_rows[:, np.arange(3) % (count - 1)]], 1)
        # Turned about, so that the row itself comes to stand in its quadrant.
        sources = np.take_along_axis(shown_rows, (np.arange(4) - own_quadrant[:, None]) % 4, 1)
        partner = keyed.other_rows("mixup_partner")[:, 0]
    centre = [keyed.uniform(stream, *settings.mosaic_centre) for stream in ("mosaic_x", "mosaic_y")]
    return {
        "mosaic": keyed.chosen("mosaic", settings.mosaic) & may_mix,
        "sources": sources,
        "place": own_quadrant,
        "centre": np.stack(centre, -1),
        "mixup": keyed.chosen("mixup", settings.mixup) & may_mix,
        "partner": partner,
        "ratio": betaincinv(settings.mixup_alpha, settings.mixup_alpha, keyed.uniform("mixup_ratio")),
    }


def _erase_rectangles(settings: AugmentSettings, keyed: _KeyedDraw) -> np.ndarray:
    """(N, 4) rectangles as fractions; the aspect is drawn evenly in its logarithm (Zhong et al. 2017)."""
    area = keyed.uniform("erase_area", *settings.erase_area)
    aspect = np.exp(keyed.uniform("erase_aspect", np.log(0.3), -np.log(0.3)))
    # Rectangles of the drawn area, no side longer than the input, placed evenly where they fit.
    height, width = np.minimum(np.sqrt(area * aspect), 1), np.minimum(np.sqrt(area / aspect), 1)
    left, top = keyed.uniform("erase_x") * (1 - width), keyed.uniform("erase_y") * (1 - height)
    chosen = keyed.chosen("erase", settings.erase)
    return np.stack([left, top, left + width, top + height], -1) * chosen[:, None]
