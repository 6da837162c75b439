"""Which engines are loaded: those in use, within a budget of bytes, the least recently used given up first."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

logger = logging.getLogger("paravae")


class Resident(Protocol):
    """Something loaded, and what it takes."""

    @property
    def resident_bytes(self) -> int: ...

    def release(self) -> None:
        """It is about to be given up."""
        ...


Loaded = TypeVar("Loaded", bound=Resident)


@dataclass
class LoadCount:
    """Of one engine: how often it was loaded, and how long that took, in seconds, altogether and last."""

    times: int = 0
    seconds: float = 0.0
    last_s: float = 0.0


@dataclass
class Residents(Generic[Loaded]):
    """Loads by key with ``load``, and keeps what fits into ``max_bytes``.

    What one call asks for is kept together whatever it takes. ``max_bytes`` None: nothing but what the last call for
    the same ``group`` asked for (with the groups "encoder" and "decoder": one pair).
    """

    load: Callable[[Hashable], Loaded]
    max_bytes: int | None = None
    loads: dict[Hashable, LoadCount] = field(default_factory=dict)
    _kept: OrderedDict[Hashable, tuple[str, Loaded]] = field(default_factory=OrderedDict)

    @property
    def keys(self) -> tuple[Hashable, ...]:
        """Of what is loaded, least recently used first."""
        return tuple(self._kept)

    @property
    def bytes(self) -> int:
        return sum(loaded.resident_bytes for _, loaded in self._kept.values())

    def get(self, group: str, wanted: Sequence[Hashable]) -> list[Loaded]:
        """What is wanted, loaded; whatever ``load`` raises, if it raises, with nothing half-loaded left behind."""
        missing = [key for key in wanted if key not in self._kept]
        if missing and self.max_bytes is None:
            self._release([key for key, (of, _) in self._kept.items() if of == group and key not in wanted])
        for key in missing:
            self._kept[key] = (group, self._timed(key))
            self._shrink(keep=wanted)
        for key in wanted:
            self._kept.move_to_end(key)
        return [self._kept[key][1] for key in wanted]

    def clear(self) -> None:
        self._release(list(self._kept))

    def _shrink(self, keep: Sequence[Hashable]) -> None:
        if self.max_bytes is None:
            return
        for key in [key for key in self._kept if key not in keep]:
            if self.bytes <= self.max_bytes:
                return
            self._release([key])

    def _release(self, keys: Sequence[Hashable]) -> None:
        for key in keys:
            _, loaded = self._kept.pop(key)
            loaded.release()
            logger.info("engine %s: released, %.0f MB", key, loaded.resident_bytes / 1e6)

    def _timed(self, key: Hashable) -> Loaded:
        started = time.perf_counter()
        loaded = self.load(key)
        count = self.loads.setdefault(key, LoadCount())
        count.last_s = time.perf_counter() - started
        count.times, count.seconds = count.times + 1, count.seconds + count.last_s
        again = "" if count.times == 1 else f", for the {count.times}th time"
        logger.info("engine %s: loaded in %.0f ms%s", key, 1e3 * count.last_s, again)
        return loaded
