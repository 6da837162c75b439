"""Tests: one file a module; ``ranks.py`` runs cases on real ranks, ``builders.py`` makes small models."""
