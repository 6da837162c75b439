"""Which photographs are used, from which packages, under which licences; and which are held out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Source:
    """One package and the photographs taken from it.

    `folder` is relative to the Python package's own folder (kind "pypi") or to the root of the unpacked
    package (kind "debian"). `train` and `heldout` are file names or globs relative to `folder`; a
    held-out picture is never a training picture, even where a `train` glob matches it, and neither is
    one named in `skip`. A Qt resource file X.rcc is unpacked to a folder X beside it.
    """

    package: str
    kind: Literal["pypi", "debian"]
    version: str  # the version this table was written for
    licence: str
    folder: str
    train: tuple[str, ...] = ()
    heldout: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    module: str = ""  # import name of a Python package


SOURCES: tuple[Source, ...] = (
    Source(
        "scikit-image",
        "pypi",
        "0.26.0",
        "BSD-3-Clause (package); pictures CC0 or public domain",
        "data",
        module="skimage",
        train=(
            "rocket.jpg",
            "hubble_deep_field.jpg",
            "motorcycle_left.png",
            "camera.png",
            "brick.png",
            "grass.png",
            "gravel.png",
        ),
        heldout=("astronaut.png", "coffee.png", "chelsea.png"),
    ),
    Source(
        "scikit-learn",
        "pypi",
        "1.9.1",
        "CC-BY-2.0 (pictures)",
        "datasets/images",
        module="sklearn",
        train=("china.jpg",),
        heldout=("flower.jpg",),
    ),
    Source(
        "matplotlib",
        "pypi",
        "3.11.2",
        "PSF-based (package); picture public domain (US Navy)",
        "mpl-data/sample_data",
        module="matplotlib",
        heldout=("grace_hopper.jpg",),
    ),
    Source(
        "budgie-core",
        "debian",
        "10.7.1-1",
        "CC0-1.0 (picture)",
        "usr/share/backgrounds/budgie",
        heldout=("default.jpg",),
    ),
    Source(
        "mate-backgrounds",
        "debian",
        "1.26.0-1",
        "GPL-2+",
        "usr/share/backgrounds/mate/nature",
        train=("*.jpg",),
        heldout=("RainDrops.jpg",),
    ),
    Source(
        "lxqt-themes",
        "debian",
        "1.2.0-1",
        "LGPL-2.1+",
        "usr/share/lxqt/wallpapers",
        train=(
            "Butterfly-Kenneth-Wimer.jpg",
            "Valendas.png",
            "after-the-rain.jpg",
            "appleflower.png",
            "beam.png",
            "butterfly.png",
            "cloud.png",
            "drop.png",
            "fog.jpg",
            "this-is-not-windows.jpg",
        ),
        heldout=("flowers.png",),
    ),
    Source(
        "plasma-workspace-wallpapers",
        "debian",
        "4:5.27.5-2",
        "LGPL-3 (pictures), GPL-2+ (package)",
        "usr/share/wallpapers",
        train=tuple(
            f"{name}/contents/images/2560x1600.jpg"
            for name in (
                "BytheWater",
                "ColdRipple",
                "ColorfulCups",
                "DarkestHour",
                "FallenLeaf",
                "Grey",
                "Kite",
                "OneStandsOut",
                "Path",
                "summer_1am",
            )
        ),
        heldout=("EveningGlow/contents/images/2560x1600.jpg",),
    ),
    Source(
        "lomiri-wallpapers-16.04",
        "debian",
        "20.04.0-2",
        "CC-BY-4.0, CC-BY-SA-4.0 or CC0-1.0, by picture",
        "usr/share/backgrounds",
        train=("*.jpg",),
        heldout=("life_by_Aitzol_Berasategi.jpg",),
        skip=("analogpattern_by_Peter_Nerlich.jpg", "umang_by_Abhishek_Mudgal.jpg"),
    ),
    Source(
        "lomiri-wallpapers-20.04",
        "debian",
        "20.04.0-2",
        "CC-BY-SA-3.0",
        "usr/share/backgrounds",
        train=("Kleiber_by_Lukas_Baubkus.jpg",),
    ),
    Source("palapeli-data", "debian", "4:22.12.3-1", "GPL-2+", "usr/share/palapeli/collection", train=("*.jpg",)),
    Source(
        "opencv-doc",
        "debian",
        "4.6.0+dfsg-12",
        "Apache-2.0 AND BSD-3-Clause",
        "usr/share/doc/opencv-doc/examples",
        train=(
            "alphamat/input_images/plant.jpg",
            "text/scenetext0?.jpg",
            *(
                f"data/{name}"
                for name in (
                    "aero1.jpg",
                    "aloeL.jpg",
                    "board.jpg",
                    "building.jpg",
                    "butterfly.jpg",
                    "chicky_512.png",
                    "fruits.jpg",
                    "graf1.png",
                    "home.jpg",
                    "leuvenA.jpg",
                    "rubberwhale1.png",
                    "squirrel_cls.jpg",
                )
            ),
        ),
    ),
    Source(
        "gcompris-qt-data",
        "debian",
        "3.1-2",
        "GPL-3+ (package); pictures public domain, CC-BY, CC-BY-SA, GFDL or GPL-3, by picture",
        "usr/share/gcompris-qt/rcc",
        train=(
            "erase/**/*.webp",
            "explore_*/**/*.webp",
            *(
                f"details/**/{name}_background.webp"
                for name in (
                    "Chenonceau",
                    "EgeskovSlotSpejling",
                    "EilanDonanCastle",
                    "FanoeWindmill",
                    "GizahPyramids",
                    "NDP",
                    "Nagoya",
                    "OperaSidney",
                    "TajMahal",
                    "TowerBridgeLondon",
                )
            ),
        ),
    ),
)
