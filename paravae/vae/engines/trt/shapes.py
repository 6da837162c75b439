"""Which sizes an engine takes, which profile serves one best, and where engines lie in their folder: integers only.

A size is (height, width) of a part's input: latents, features or pixels (``parts.PORTS``), as the part takes them.

The sizes that LightX2V's users have engines for are published inconsistently. Its build script rounds nothing (1080 and
1620 px are no multiples of 8, nor is 1140, the height it has for 4:3), its runtime has 1088 for 1080 but leaves 1620,
and calls 1024 x 768 (height x width) 3:4. Here every side is a multiple of 8, 1080 and 1620 being rounded up, and the
ratios are those of Qwen-Image.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from paravae.vae.engines.trt.parts import Part

Size = tuple[int, int]

RATIOS: dict[str, Size] = {
    "16_9": (928, 1664),
    "9_16": (1664, 928),
    "1_1": (1328, 1328),
    "4_3": (1104, 1472),
    "3_4": (1472, 1104),
    "3_2": (1056, 1584),
    "2_3": (1584, 1056),
}
"""Folder of a text-to-image ratio -> height and width of its picture in pixels."""

LEAST_PX, MOST_PX = 64, 1920
"""Ends of what the profiles of a multi-profile engine cover together, in height and in width."""

PRESETS_PX: tuple[Size, ...] = (
    (512, 512), (1024, 1024), (480, 848), (720, 1280), (1088, 1920), (1280, 720), (1920, 1088), (768, 1024),
    (1088, 1624),
)  # fmt: skip
"""What the nine profiles are best at; the last takes whatever the others do not."""
_UNIT_PX = 8


@dataclass(frozen=True)
class Profile:
    """The sizes ``min <= size <= max`` that an engine takes, and the one that it was optimised for."""

    min: Size
    opt: Size
    max: Size

    def __post_init__(self) -> None:
        for low, best, high in zip(self.min, self.opt, self.max, strict=True):
            if not 1 <= low <= best <= high:
                raise ValueError(f"profile {self} needs 1 <= min <= opt <= max in height and in width")

    def __str__(self) -> str:
        return size_text(self.opt) if self.is_static else " ".join(map(size_text, (self.min, self.opt, self.max)))

    @staticmethod
    def static(size: Size) -> Profile:
        """The profile that takes this size alone."""
        return Profile(size, size, size)

    @property
    def is_static(self) -> bool:
        return self.min == self.max

    def contains(self, size: Size) -> bool:
        return all(low <= side <= high for low, side, high in zip(self.min, size, self.max, strict=True))

    def distance(self, size: Size) -> int:
        """From ``opt``: the difference in height plus that in width, as LightX2V has it."""
        return sum(abs(side - best) for side, best in zip(size, self.opt, strict=True))


def choose_profile(profiles: Sequence[Profile], size: Size) -> int | None:
    """Index of the profile for ``size``: of those that contain it the one whose ``opt`` is nearest
    (``Profile.distance``), the first of equals; None if none contains it."""
    fitting = [index for index, profile in enumerate(profiles) if profile.contains(size)]
    return min(fitting, key=lambda index: profiles[index].distance(size), default=None)


def multi_profiles(unit_px: int = 1) -> tuple[Profile, ...]:
    """The nine profiles, in units of ``unit_px`` pixels: 1, or the 8 that a latent covers.

    Each reaches from 64 x 64 to a quarter more than its preset in both directions, so that a size a little larger than
    a preset is still served by it, and no profile needs the memory of another several times its size. The last reaches
    to 1920 x 1920.
    """

    def profile(preset: Size) -> Profile:
        most = (MOST_PX, MOST_PX) if preset == PRESETS_PX[-1] else _quarter_more(preset)
        low, best, high = ((size[0] // unit_px, size[1] // unit_px) for size in ((LEAST_PX, LEAST_PX), preset, most))
        return Profile(low, best, high)

    return tuple(map(profile, PRESETS_PX))


def _quarter_more(size: Size) -> Size:
    height, width = (min(side * 5 // 4 // _UNIT_PX * _UNIT_PX, MOST_PX) for side in size)
    return height, width


# -------------------------------------------------------------------------------------------------- engines


@dataclass(frozen=True)
class Target:
    """An engine to be: a part, the sizes it takes, and its ``file``, relative to the folder of all."""

    part: Part
    profiles: tuple[Profile, ...]
    file: str


def static_target(part: Part, size_px: Size, unit_px: int) -> Target:
    """``part``, the decoder or the encoder, for pictures of one size; ``unit_px``: pixels of what it takes."""
    folder = next((name for name, size in RATIOS.items() if size == size_px), size_text(size_px))
    size = size_px[0] // unit_px, size_px[1] // unit_px
    return Target(part, (Profile.static(size),), f"{folder}/vae_{part}.trt")


def multi_profile_target(part: Part, unit_px: int) -> Target:
    """``part``, the decoder or the encoder, for pictures of any size from 64 to 1920 pixels."""
    return Target(part, multi_profiles(unit_px), f"vae_{part}_multi_profile.trt")


def window_targets(needs: Iterable[tuple[Part, Size]]) -> list[Target]:
    """One for each (part, size of its input), in a fixed order; several ranks may share a shape."""
    return [
        Target(part, (Profile.static(size),), f"parallel/{part}_{size_text(size)}.trt")
        for part, size in sorted(set(needs))
    ]


def size_text(size: Size) -> str:
    """Width x height, as people write it."""
    return f"{size[1]}x{size[0]}"
