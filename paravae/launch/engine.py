"""``paravae engine``: TensorRT engines of a VAE: build them, list them, verify them."""

from __future__ import annotations

import argparse

from paravae.launch.world import Place


def add_flags(parser: argparse.ArgumentParser) -> None:
    """It has none: what it is to do, says another word."""


def run(args: argparse.Namespace, place: Place) -> None:
    """Raise ValueError: that word is missing."""
    raise ValueError("paravae engine: say build, list or verify (paravae engine --help explains)")
