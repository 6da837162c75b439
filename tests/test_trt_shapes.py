"""Sizes of TensorRT engines: profiles cover what they are to cover, and the nearest is chosen; files cannot clash."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paravae.vae.engines.trt import shapes
from paravae.vae.engines.trt.shapes import LEAST_PX, MOST_PX, PRESETS_PX, RATIOS, Profile, Size, choose_profile

EVERY_SIDE = range(LEAST_PX, MOST_PX + 1, 8)
sides = st.integers(1, 300)
sizes = st.tuples(sides, sides)


@st.composite
def some_profiles(draw: st.DrawFn) -> Profile:
    axes = [sorted(draw(st.lists(sides, min_size=3, max_size=3))) for _ in range(2)]
    low, best, high = zip(*axes, strict=True)
    return Profile(low, best, high)


def holes(profiles: tuple[Profile, ...], unit_px: int) -> list[Size]:
    """Sizes from 64 x 64 to 1920 x 1920 pixels that no profile takes."""
    grid = [(height // unit_px, width // unit_px) for height in EVERY_SIDE for width in EVERY_SIDE]
    return [size for size in grid if choose_profile(profiles, size) is None]


@pytest.mark.parametrize("unit_px", [1, 8])
def test_the_nine_profiles_cover_every_size_without_a_hole(unit_px: int) -> None:
    profiles = shapes.multi_profiles(unit_px)
    assert len(profiles) == 9
    assert holes(profiles, unit_px) == []
    assert choose_profile(profiles, (MOST_PX // unit_px + 1, 64)) is None
    assert choose_profile(profiles, (64, LEAST_PX // unit_px - 1)) is None


def test_a_hole_would_be_noticed() -> None:
    profiles = list(shapes.multi_profiles())
    profiles[-1] = dataclasses.replace(profiles[-1], max=(1912, 1920))
    assert holes(tuple(profiles), 1) == [(1920, width) for width in EVERY_SIDE if width > 1360]


def test_presets_and_ratios_are_the_published_ones_in_multiples_of_8() -> None:
    stated = [
        "512x512",
        "1024x1024",
        "848x480",
        "1280x720",
        "1920x1088",
        "720x1280",
        "1088x1920",
        "1024x768",
        "1624x1088",
    ]
    assert [shapes.size_text(size) for size in PRESETS_PX] == stated
    ratios = ["1664x928", "928x1664", "1328x1328", "1472x1104", "1104x1472", "1584x1056", "1056x1584"]
    assert [shapes.size_text(size) for size in RATIOS.values()] == ratios
    for name, (height, width) in RATIOS.items():
        across, down = map(int, name.split("_"))
        assert abs(width / height / (across / down) - 1) < 0.01
    assert all(side % 8 == 0 for size in (*PRESETS_PX, *RATIOS.values()) for side in size)
    for profile, in_latents in zip(shapes.multi_profiles(), shapes.multi_profiles(8), strict=True):
        for end in ("min", "opt", "max"):
            assert getattr(profile, end) == tuple(8 * side for side in getattr(in_latents, end))


@pytest.mark.parametrize("preset", PRESETS_PX)
def test_a_preset_and_what_is_next_to_it_have_its_own_profile(preset: Size) -> None:
    profiles, (height, width) = shapes.multi_profiles(), preset
    for size in (preset, (height - 8, width - 8), (min(height + 8, MOST_PX), min(width + 8, MOST_PX))):
        index = choose_profile(profiles, size)
        assert index is not None
        assert profiles[index].opt == preset


@given(st.lists(some_profiles(), max_size=6), sizes)
def test_the_choice_contains_the_size_and_none_that_does_is_nearer(profiles: list[Profile], size: Size) -> None:
    index = choose_profile(profiles, size)
    fitting = [profile for profile in profiles if profile.contains(size)]
    if index is None:
        assert not fitting
        return
    chosen = profiles[index]
    assert chosen.contains(size)
    assert all(low <= side <= high for low, side, high in zip(chosen.min, size, chosen.max, strict=True))
    distance = abs(chosen.opt[0] - size[0]) + abs(chosen.opt[1] - size[1])
    assert all(distance <= abs(p.opt[0] - size[0]) + abs(p.opt[1] - size[1]) for p in fitting)
    assert index == min(place for place, p in enumerate(profiles) if p in fitting and p.distance(size) == distance)


@given(some_profiles(), sizes)
def test_a_static_profile_takes_its_size_only(profile: Profile, size: Size) -> None:
    static = Profile.static(profile.opt)
    assert static.is_static
    assert static.contains(size) == (size == profile.opt)
    assert profile.contains(profile.opt)


def test_containment_goes_before_distance() -> None:
    near = Profile((1, 1), (99, 99), (99, 99))
    far = Profile((1, 1), (1, 1), (200, 200))
    assert choose_profile([near, far], (100, 100)) == 1
    assert choose_profile([far, far], (100, 100)) == 0
    assert choose_profile([], (100, 100)) is None


@pytest.mark.parametrize("ends", [((0, 1), (1, 1), (1, 1)), ((2, 1), (1, 1), (2, 2)), ((1, 1), (1, 3), (2, 2))])
def test_a_profile_without_order_is_none(ends: tuple[Size, Size, Size]) -> None:
    with pytest.raises(ValueError, match="min <= opt <= max"):
        Profile(*ends)


def test_files_are_where_lightx2v_has_them_and_cannot_clash() -> None:
    named = [shapes.static_target(part, size, 8) for part in ("decoder", "encoder") for size in RATIOS.values()]
    assert [target.file for target in named[:7]] == [f"{name}/vae_decoder.trt" for name in RATIOS]
    multi = [shapes.multi_profile_target(part, 8) for part in ("decoder", "encoder")]
    assert [target.file for target in multi] == ["vae_decoder_multi_profile.trt", "vae_encoder_multi_profile.trt"]
    other = [shapes.static_target("decoder", size, 8) for size in ((1024, 768), (768, 1024), (64, 64))]
    assert other[0].file == "768x1024/vae_decoder.trt"
    assert other[0].profiles == (Profile.static((128, 96)),)
    needs = [("decoder_tail", (30, 40)), ("decoder_head", (30, 40)), ("decoder_tail", (40, 30))]
    windows = shapes.window_targets(needs + needs)
    assert [target.file for target in windows] == [
        "parallel/decoder_head_40x30.trt",
        "parallel/decoder_tail_40x30.trt",
        "parallel/decoder_tail_30x40.trt",
    ]
    files = [target.file for target in (*named, *multi, *other, *windows)]
    assert len(set(files)) == len(files)
