"""How long a plan takes and what it needs: a few constants a machine, multiplied with what the plan computes and sends.

The model: a decode takes a fixed time (launches, and the small kernels that leave a GPU idle), a time for each
multiply-add that depends on the size of the activations it happens at, a time for each multiply-add of the attention,
and, where there are several ranks, a time for keeping in step and the gathers. It is linear in its constants, which is
how ``paravae bench calibrate`` finds them; machines.json has those of the GPUs it has been run on, and says of the
others where theirs come from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from paravae.vae import plan
from paravae.vae.plan import PatchPlan, Span, Stages, TilePlan, Window

DEFAULT = "default"
_GIGA = 1e9


@dataclass(frozen=True)
class Rates:
    """Of one engine on one GPU. ``conv_ms``: for 10^9 multiply-adds of convolutions, by the size of their output: at
    latent size, twice, four, eight times that. ``attention_ms``: for 10^9 of the attention. ``fixed_ms``: once a
    decode; ``frame_ms``: once for each later latent frame of a stream, whose convolutions take ``stream`` times as
    long for the same multiply-adds. ``blend_ms``: for 10^6 pixels of all tiles together.
    """

    fixed_ms: float
    conv_ms: tuple[float, ...]
    attention_ms: float
    frame_ms: float
    stream: float
    blend_ms: float

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Rates:
        """Raises TypeError or KeyError if something is missing or unknown."""
        return Rates(**{**values, "conv_ms": tuple(values["conv_ms"])})

    def convolutions_ms(self, work: Sequence[int]) -> float:
        """``work`` as ``plan.work_by_size`` gives it; more sizes than constants take the last constant."""
        rates = [*self.conv_ms, *[self.conv_ms[-1]] * max(0, len(work) - len(self.conv_ms))]
        return sum(one * rate for one, rate in zip(work, rates, strict=False)) / _GIGA


@dataclass(frozen=True)
class Link:
    """Between the GPUs: what a gather takes before its bytes, and the 10^9 bytes a second that a rank receives.

    ``step_ms``: once a decode of several ranks, whoever does the work: they agree that all is well before and after.
    """

    latency_ms: float
    gb_per_s: float
    step_ms: float = 0.0

    def gather_ms(self, shard_bytes: int, ranks: int) -> float:
        """An all-gather of equal shards."""
        if ranks == 1:
            return 0.0
        return self.latency_ms + (ranks - 1) * shard_bytes / self.gb_per_s / 1e6


@dataclass(frozen=True)
class Machine:
    """What the model knows of a GPU. ``source``: where its constants come from. ``engines``: fast, torch16, torch32."""

    name: str
    source: str
    engines: Mapping[str, Rates]
    link: Link

    def rates(self, kind: str) -> Rates:
        """Of the engine of that ``Engine.kind``."""
        return self.engines[kind]

    def to_json(self) -> str:
        """What ``from_json`` reads."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Machine:
        """Raises ValueError if something is missing or unknown."""
        try:
            values = json.loads(text)
            return Machine.from_dict(values["name"], values)
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"no constants of a machine: {type(error).__name__}: {error}") from error

    @staticmethod
    def from_dict(name: str, values: Mapping[str, Any]) -> Machine:
        """Raises ValueError if something is missing or unknown."""
        try:
            engines = {kind: Rates.from_dict(rates) for kind, rates in values["engines"].items()}
            return Machine(name, str(values["source"]), engines, Link(**values["link"]))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"the constants of {name} are not whole: {type(error).__name__}: {error}") from error


@lru_cache(maxsize=1)
def machines() -> dict[str, Machine]:
    """The machines that paravae knows, by the name that CUDA gives them."""
    text = resources.files("paravae.vae").joinpath("machines.json").read_text(encoding="utf-8")
    return {name: Machine.from_dict(name, values) for name, values in json.loads(text).items()}


def machine_named(name: str) -> Machine:
    """The machine of a GPU's name: its own constants, those of its kin ("NVIDIA H100" for "NVIDIA H100 80GB HBM3"), or
    the default's."""
    known = machines()
    kin = [key for key in known if key in name]
    return known[max(kin, key=len)] if kin else known[DEFAULT]


def read_machine(path: Path) -> Machine:
    """The constants that ``paravae bench calibrate`` wrote.

    Raises:
        ValueError: the file is not such a file.
    """
    try:
        return Machine.from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cost_table (--vae-config.cost-table) {path}: {error}") from error


def machine_of(table: str | Path | None, name: str) -> Machine:
    """The constants in the file ``table`` if one is given (a config's ``cost_table``), else those of the GPU ``name``.

    Raises: as ``read_machine`` does.
    """
    return read_machine(Path(table)) if table else machine_named(name)


@dataclass(frozen=True)
class _Part:
    """What a rank computes: the head along ``front``, its attention of ``queries``, the tail along ``trace``."""

    front: Sequence[Window]
    trace: Sequence[Window]
    queries: int
    images: int


@dataclass(frozen=True)
class DecodeCost:
    """What a prediction must know of a decode. ``shape``: of the latents, [B, z, T, h, w]; ``value_bytes``: of a number
    in the network, ``pixel_bytes``: of one of the result."""

    front: Stages
    tail: Stages
    channels: int
    shape: tuple[int, ...]
    value_bytes: int
    pixel_bytes: int
    temporal_ratio: int
    rates: Rates
    link: Link

    def patch_ms(self, patches: PatchPlan, ranks: int) -> float:
        """Of the busiest rank, with the gathers among ``ranks``; a lone window is each rank's own."""
        slowest = max(self._rank_ms(patches, rank) for rank in range(len(patches.traces))) + self._step_ms(ranks)
        return slowest if len(patches.traces) == 1 else slowest + self._exchange_ms(patches, ranks)

    def tiled_ms(self, tiles: TilePlan, ranks: int) -> float:
        """Of the rank with most tiles, with the gather and the blending of all."""
        front, trace = plan.whole(self.front, *tiles.tile), plan.whole(self.tail, *tiles.tile)
        batch, share = self.shape[0], tiles.shares(ranks)[0].size
        calls = -(-share // tiles.batch)
        ms = calls * self._ms(_Part(front, trace, trace[0].area, tiles.batch * batch), trace[0].area)
        tile_px = batch * self._pixel_frames * trace[-1].area
        ms += self.rates.blend_ms * len(tiles.tiles) * tile_px / 1e6 + self._step_ms(ranks)
        return ms + self.link.gather_ms(share * 3 * tile_px * self.value_bytes, ranks)

    def _step_ms(self, ranks: int) -> float:
        return self.link.step_ms if ranks > 1 else 0.0

    @property
    def _tokens(self) -> int:
        return self.shape[-2] * self.shape[-1]

    @property
    def _pixel_frames(self) -> int:
        return 1 + (self.shape[2] - 1) * self.temporal_ratio

    def rank_work(self, patches: PatchPlan, rank: int) -> int:
        """Multiply-adds of what ``rank`` computes, for the first latent frame."""
        part = self._part(patches, rank)
        if part is None:
            return 0
        head = plan.local_work(self.front, part.front) + plan.projections_work(self.channels, part.front[-1].area)
        head += plan.attention_work(self.channels, part.queries, self._tokens)
        return part.images * (head + plan.local_work(self.tail, part.trace))

    def _rank_ms(self, patches: PatchPlan, rank: int) -> float:
        part = self._part(patches, rank)
        return 0.0 if part is None else self._ms(part, self._tokens)

    def _part(self, patches: PatchPlan, rank: int) -> _Part | None:
        """What ``rank`` computes; None: nothing."""
        trace, images = patches.traces[rank], patches.images[rank].size
        height, width = self.shape[-2:]
        if patches.head_rows is not None:
            own = Window(patches.head_rows[rank], Span(0, width))
            return _Part(plan.trace_window(self.front, own, height, width), trace, own.area, self.shape[0])
        if not trace[-1].area:
            return None
        return _Part(plan.whole(self.front, height, width), trace, trace[0].area, images)

    def _ms(self, part: _Part, tokens: int) -> float:
        """Of the head, its attention to ``tokens``, and the tail."""
        front, trace = part.front, part.trace
        one = plan.attention_work(self.channels, part.queries, tokens) / _GIGA * self.rates.attention_ms

        def frame_ms(stream: bool) -> float:
            head = sum(plan.work_by_size(self.front, front, stream=stream))
            head += plan.projections_work(self.channels, front[-1].area)
            tail = plan.work_by_size(self.tail, trace, stream=stream)
            convolutions = self.rates.convolutions_ms([head]) + self.rates.convolutions_ms(tail)
            return part.images * (one + convolutions * (self.rates.stream if stream else 1))

        later = self.shape[2] - 1
        return self.rates.fixed_ms + frame_ms(False) + (later * (self.rates.frame_ms + frame_ms(True)) if later else 0)

    def _exchange_ms(self, patches: PatchPlan, ranks: int) -> float:
        """Pixels; where the head is shared keys and values, stream and attention's result; of each latent frame."""
        images, rows, cols = patches.shard_size
        pixels_ms = self.link.gather_ms(images * 3 * rows * cols * self.pixel_bytes * self._pixel_frames, ranks)
        later_ms = (self.shape[2] - 1) * self.link.latency_ms
        if patches.head_rows is None:
            return pixels_ms + later_ms
        tokens = max(span.size for span in patches.head_rows) * self.shape[-1]
        features = self.shape[0] * tokens * self.channels * self.value_bytes
        one_ms = self.link.gather_ms(2 * features, ranks) + 2 * self.link.gather_ms(features, ranks)
        return pixels_ms + later_ms + self.shape[2] * one_ms
