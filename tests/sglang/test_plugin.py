"""How SGLang comes to know of paravae: the entry point, the external package, and the switch that turns it off."""

from __future__ import annotations

import importlib
import logging
import sys
from importlib import metadata
from typing import Any

import pytest

pytest.importorskip("sglang", reason="needs SGLang: make test-sglang")

from sglang.multimodal_gen.runtime.platforms.plugins import load_plugins
from sglang.multimodal_gen.runtime.utils.external_model_package import load_external_model_package

from paravae.integrations import sglang_plugin

ARCHS = ("AutoencoderKLQwenImage", "AutoencoderKLWan")
PLUGIN = "paravae.integrations.sglang_plugin"


def served_by(registry: Any) -> list[str]:
    return [registry.resolve_model_cls(arch)[0].__module__.split(".")[0] for arch in ARCHS]


def test_this_is_the_sglang_that_the_plugin_was_made_for() -> None:
    assert metadata.version("sglang") == sglang_plugin.SGLANG_VERSION


def test_installing_paravae_is_enough(registry: Any, caplog: pytest.LogCaptureFixture) -> None:
    """The entry point of the installed package, found and called by SGLang's own ``load_plugins``."""
    assert served_by(registry) == ["sglang", "sglang"]
    with caplog.at_level(logging.INFO):
        load_plugins()
    assert served_by(registry) == ["paravae", "paravae"]
    lines = [record.getMessage() for record in caplog.records if "paravae: " in record.getMessage()]
    assert lines == ["paravae: serves AutoencoderKLQwenImage and AutoencoderKLWan (PARAVAE_SGLANG=0 turns it off)"]
    assert "overwritten" not in caplog.text


def test_registering_again_changes_nothing(registry: Any, caplog: pytest.LogCaptureFixture) -> None:
    sglang_plugin.register()
    before = dict(registry.registered_models)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        sglang_plugin.register()
    assert registry.registered_models == before
    assert not caplog.records


@pytest.mark.parametrize("value", ["0", "false", "off"])
def test_off_switch(
    value: str, registry: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PARAVAE_SGLANG", value)
    with caplog.at_level(logging.INFO):
        load_plugins()
    assert served_by(registry) == ["sglang", "sglang"]
    assert f"paravae: off (PARAVAE_SGLANG={value})" in caplog.text


def test_external_model_package(registry: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang imports the named module when it first looks a model up; here without the entry point."""
    monkeypatch.setenv("SGLANG_EXTERNAL_MODEL_PACKAGE", PLUGIN)
    monkeypatch.delitem(sys.modules, PLUGIN)
    load_external_model_package.cache_clear()
    assert served_by(registry) == ["paravae", "paravae"]
    load_external_model_package.cache_clear()


def test_importing_the_module_alone_registers_nothing(registry: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, PLUGIN)
    importlib.import_module(PLUGIN)
    assert served_by(registry) == ["sglang", "sglang"]


def test_another_sglang_is_warned_of_and_served(
    registry: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: "0.6.0")
    sglang_plugin.register()
    assert served_by(registry) == ["paravae", "paravae"]
    assert "made for SGLang 0.5.23, this is 0.6.0" in caplog.text
