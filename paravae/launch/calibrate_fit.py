"""From measured times to the constants of ``vae/cost.py``: least squares of relative errors, no constant below zero.

The cost model is linear in each constant, so the model itself says what a measurement has of it: by how much its
prediction grows as the constant goes from zero to one. Some can hardly be told apart: every picture has each level of
activations in the same proportion, and only windows, with their halos, in others. So each constant is also held near
the one known before, scaled to this machine's speed: the more loosely, the better the measurements agree with the
model.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from paravae.vae.cost import DecodeCost, Link, Rates
from paravae.vae.plan import PatchPlan, TilePlan

_SPREAD = 0.3  # by which constants of two machines may well differ, speed apart
_USUAL_NOISE = 0.02  # relative, of times that are too few to tell
_LINK_NOISE = 0.01  # relative, of times of which little is the exchange
_TIMES = ("fixed_ms", "attention_ms", "frame_ms", "blend_ms")
_FASTEST_GB_PER_S = 1e5  # where bytes seem to cost nothing

Constants = tuple[Rates, Link]


class Sample(Protocol):
    """A time that was measured, and what the model says of it."""

    @property
    def ms(self) -> float: ...

    def predict(self, rates: Rates, link: Link) -> float:
        """Milliseconds by those constants."""
        ...


@dataclass(frozen=True)
class DecodeSample:
    """A decode. ``layout``: of all ``ranks``, or one rank's own window."""

    cost: DecodeCost
    layout: PatchPlan | TilePlan
    ranks: int
    ms: float

    def predict(self, rates: Rates, link: Link) -> float:
        cost = replace(self.cost, rates=rates, link=link)
        if isinstance(self.layout, TilePlan):
            return cost.tiled_ms(self.layout, self.ranks)
        return cost.patch_ms(self.layout, self.ranks)


@dataclass(frozen=True)
class SharedSample:
    """A decode of several ranks of which is known what the slowest computed, ``compute_ms``."""

    decode: DecodeSample
    compute_ms: float

    @property
    def ms(self) -> float:
        return self.decode.ms

    def predict(self, rates: Rates, link: Link) -> float:
        return self.compute_ms + self.decode.predict(NO_RATES, link)


@dataclass(frozen=True)
class GatherSample:
    """An all-gather of ``shard_bytes`` of each rank."""

    shard_bytes: int
    ranks: int
    ms: float

    def predict(self, rates: Rates, link: Link) -> float:
        return link.gather_ms(self.shard_bytes, self.ranks)


NO_RATES = Rates(0.0, (0.0,), 0.0, 0.0, 0.0, 0.0)
NO_LINK = Link(0.0, _FASTEST_GB_PER_S)


@dataclass(frozen=True)
class _Knob:
    """A constant that can be turned: read from, or set in, the constants."""

    get: Callable[[Constants], float]
    set: Callable[[Constants, float], Constants]


def _rate(name: str) -> _Knob:
    def turned(all_: Constants, value: float) -> Constants:
        changed: Any = {name: value}
        return replace(all_[0], **changed), all_[1]

    return _Knob(lambda all_: getattr(all_[0], name), turned)


def _level(index: int) -> _Knob:
    def turned(all_: Constants, value: float) -> Constants:
        levels = list(all_[0].conv_ms)
        levels[index] = value
        return replace(all_[0], conv_ms=tuple(levels)), all_[1]

    return _Knob(lambda all_: all_[0].conv_ms[index], turned)


def _link(name: str) -> _Knob:
    return _Knob(lambda all_: getattr(all_[1], name), lambda all_, value: (all_[0], replace(all_[1], **{name: value})))


def _per_byte() -> _Knob:
    """Of the rate's inverse the times are linear."""

    def turned(all_: Constants, value: float) -> Constants:
        return all_[0], replace(all_[1], gb_per_s=1 / max(value, 1 / _FASTEST_GB_PER_S))

    return _Knob(lambda all_: 1 / all_[1].gb_per_s, turned)


def fit_rates(
    known: Rates, images: Sequence[Sample], videos: Sequence[Sample] = (), tiled: Sequence[Sample] = ()
) -> Rates:
    """``known`` with the constants that decodes on one device show: of images, whole and windows, videos and tiles."""
    levels = [_level(index) for index in range(len(known.conv_ms))]
    guess = _slowed(known, _slower((known, NO_LINK), images)), NO_LINK
    found = _fit([_rate("fixed_ms"), *levels, _rate("attention_ms")], guess, images)
    noise = _error(found, images)
    found = _fit([_rate("frame_ms"), _rate("stream")], found, videos, noise)
    return _fit([_rate("blend_ms")], found, tiled, noise)[0]


def fit_link(known: Link, gathers: Sequence[GatherSample], shared: Sequence[SharedSample]) -> Link:
    """``known`` with the constants that gathers show, and what these and keeping in step take within a decode."""
    slower = _slower((NO_RATES, known), gathers)
    guess = replace(known, latency_ms=known.latency_ms * slower, gb_per_s=known.gb_per_s / slower)
    found = _fit([_link("latency_ms"), _per_byte()], (NO_RATES, guess), gathers)
    return _fit([_link("step_ms"), _link("latency_ms")], found, shared, _LINK_NOISE)[1]


def _fit(knobs: Sequence[_Knob], known: Constants, samples: Sequence[Sample], noise: float = 0.0) -> Constants:
    """``known`` with the ``knobs`` turned to what the samples show; as it is, where there are none.

    ``noise``: the least relative error that the samples are taken to have.
    """
    if not samples:
        return known
    base = known
    for knob in knobs:
        base = knob.set(base, 0.0)
    ms = np.array([sample.ms for sample in samples])
    rest = ms - [sample.predict(*base) for sample in samples]
    ones = [knob.set(base, 1.0) for knob in knobs]
    grows = np.array([[sample.predict(*one) - sample.predict(*base) for one in ones] for sample in samples])
    guess = np.array([knob.get(known) for knob in knobs])
    a, b = grows / ms[:, None], rest / ms
    left, spare = a @ nnls(a, b) - b, len(ms) - len(knobs)
    noise = max(noise, float(np.sqrt(left @ left / spare)) if spare > 0 else _USUAL_NOISE)
    held = np.eye(len(knobs))[guess > 0] * (noise / _SPREAD)
    values = nnls(np.concatenate([a, held / guess[guess > 0, None]]), np.concatenate([b, held.sum(1)]))
    found = known
    for knob, value in zip(knobs, values, strict=True):
        found = knob.set(found, float(value))
    return found


def _error(constants: Constants, samples: Sequence[Sample]) -> float:
    """Root of the mean squared relative error; none, of no samples."""
    errors = [sample.predict(*constants) / sample.ms - 1 for sample in samples]
    return float(np.sqrt(np.mean(np.square(errors)))) if errors else 0.0


def _slower(known: Constants, samples: Sequence[Sample]) -> float:
    """How many times as slow this machine is as the one whose constants are known."""
    ratios = [sample.ms / sample.predict(*known) for sample in samples]
    return statistics.median(ratios) if ratios else 1.0


def _slowed(rates: Rates, slower: float) -> Rates:
    changed: Any = {name: slower * getattr(rates, name) for name in _TIMES}
    return replace(rates, conv_ms=tuple(slower * one for one in rates.conv_ms), **changed)


def nnls(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The x >= 0 for which ``a x`` is nearest to ``b``, by Lawson and Hanson's active set."""
    size = np.linalg.norm(a, axis=0)
    size[size == 0] = 1  # columns of one length, so that one tolerance serves all
    a = a / size
    x, free = np.zeros(a.shape[1]), np.zeros(a.shape[1], dtype=bool)
    for _ in range(10 * a.shape[1]):
        gain = np.where(free, -np.inf, a.T @ (b - a @ x))
        if gain.max() <= 1e-10 * max(1.0, float(np.linalg.norm(b))):
            break
        free[gain.argmax()] = True
        while True:
            trial = np.zeros_like(x)
            trial[free] = np.linalg.lstsq(a[:, free], b, rcond=None)[0]
            below = free & (trial <= 0)
            if not below.any():
                break
            step = (x[below] / (x[below] - trial[below])).min()
            x += step * (trial - x)
            free &= x > 1e-12
            x[~free] = 0
        x = trial
    return x / size
