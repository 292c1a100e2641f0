"""Does the review threshold keep its promise? Made populations whose true risk is known.

    python -m benchmarks.quality.review_threshold --draws 2000

Draws a calibration set again and again, sets the threshold on it, and looks up the true risk of what it accepts in a
population of a million. ``violations`` may be at most ``delta`` of the draws, but for chance. ``accepted`` is the share
of the population that passes: a threshold that accepts nothing keeps any promise.
"""

import argparse
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from pipeline.uncertainty.calibration import fit_review_threshold
from pipeline.uncertainty.calibration.review_threshold import Method

SIZE = 1_000_000


def _informative(rng: np.random.Generator, scores: np.ndarray) -> np.ndarray:
    return rng.beta(0.05 + 1.2 * scores**2, 2.0)


def _useless(rng: np.random.Generator, scores: np.ndarray) -> np.ndarray:
    return rng.beta(0.5, 4.0, len(scores))


def _binary(rng: np.random.Generator, scores: np.ndarray) -> np.ndarray:
    return (rng.random(len(scores)) < 0.3 * scores).astype(float)


def _bump(rng: np.random.Generator, scores: np.ndarray) -> np.ndarray:
    return (rng.random(len(scores)) < np.where((scores > 0.3) & (scores < 0.5), 0.5, 0.02)).astype(float)


def _inverted(rng: np.random.Generator, scores: np.ndarray) -> np.ndarray:
    return np.clip(0.4 * (1 - scores) + rng.normal(0, 0.05, len(scores)), 0, 1)


def _rare(rng: np.random.Generator, scores: np.ndarray) -> np.ndarray:
    return np.where(rng.random(len(scores)) < 0.04, 1.0, 0.02 * scores)


def _ties(rng: np.random.Generator, scores: np.ndarray) -> np.ndarray:
    return np.clip(0.3 * np.round(scores, 1) + rng.normal(0, 0.05, len(scores)), 0, 1)


POPULATIONS: dict[str, Callable[[np.random.Generator, np.ndarray], np.ndarray]] = {
    "informative": _informative,
    "binary losses": _binary,
    "ties": _ties,
    "useless score": _useless,
    "risk that rises and falls": _bump,
    "score the wrong way round": _inverted,
    "rare large losses": _rare,
}


@lru_cache(maxsize=2)
def _population(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(scores float32 sorted, losses in their order, mean loss of all up to each)."""
    rng = np.random.default_rng(0)
    scores = rng.random(SIZE)
    losses = POPULATIONS[name](rng, scores)
    scores = (np.round(scores, 1) if name == "ties" else scores).astype(np.float32)
    order = np.argsort(scores, kind="stable")
    return scores[order], losses[order], np.cumsum(losses[order]) / np.arange(1, SIZE + 1)


def draw(
    name: str, factor: float, delta: float, n: int, draws: int, seed: int, method: Method = "betting"
) -> dict[str, Any]:
    """Thresholds of ``draws`` calibration sets of ``n``, at risk = ``factor`` times the mean loss."""
    scores, losses, risks = _population(name)
    risk = factor * float(losses.mean())
    rng = np.random.default_rng(seed)
    violations, accepted = 0, 0
    for _ in range(draws):
        rows = rng.integers(0, SIZE, n)
        value = fit_review_threshold(scores[rows], losses[rows], risk, delta, method, explain=False).value
        if value is not None:
            passed = int(np.searchsorted(scores, np.float32(value), side="right"))
            accepted += passed
            violations += passed > 0 and bool(risks[passed - 1] > risk)
    return {
        "population": name, "risk / mean": factor, "n": n, "method": method, "draws": draws,
        "violations": violations, "allowed": delta, "accepted": accepted / draws / SIZE,
    }  # fmt: skip


def repeated_splits(
    scores: np.ndarray, losses: np.ndarray, risk: float, delta: float, n: int, repeats: int, seed: int
) -> dict[str, Any]:
    """The same on real rows: ``n`` of them set the threshold, the others are judged.

    A violation here is of the mean of the rest, itself a finite sample: at the edge it is above the risk in half of
    the cases without any fault of the threshold.
    """
    rng = np.random.default_rng(seed)
    violations, shares, means = 0, [], []
    for _ in range(repeats):
        order = rng.permutation(len(scores))
        some, rest = order[:n], order[n:]
        value = fit_review_threshold(scores[some], losses[some], risk, delta, explain=False).value
        inside = scores[rest].astype(np.float32) <= np.float32(-np.inf if value is None else value)
        shares.append(float(inside.mean()))
        if inside.any():
            means.append(float(losses[rest][inside].mean()))
            violations += means[-1] > risk
    return {
        "repeats": repeats, "violations": violations, "accepted": float(np.mean(shares)),
        "accepted_loss": float(np.mean(means)) if means else None,
    }  # fmt: skip


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--delta", type=float, default=0.1)
    args = parser.parse_args()
    print("| population | risk / mean | method | violations | allowed | accepted |\n|---|---|---|---|---|---|")
    for name in POPULATIONS:
        for factor in (0.8, 1.0, 1.5):
            for method in ("betting", "hoeffding_bentkus"):
                found = draw(name, factor, args.delta, args.n, args.draws, 0, method)
                share = found["violations"] / args.draws
                print(f"| {name} | {factor} | {method} | {share:.4f} | {args.delta} | {found['accepted']:.3f} |")


if __name__ == "__main__":
    main()
