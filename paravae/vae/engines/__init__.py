"""Engines: a window of latents in, its pixels out, on one device."""
