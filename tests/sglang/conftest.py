"""SGLang's state in this process, put back after each test; and one published-layout directory for all."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory as Qwen/Qwen-Image's, with a small random VAE and nothing else."""
    from tests.sglang.models import publish

    return publish(tmp_path_factory.mktemp("models") / "Qwen-Image")


@pytest.fixture
def registry() -> Iterator[Any]:
    """SGLang's model registry without paravae."""
    from sglang.multimodal_gen.runtime.models.registry import ModelRegistry
    from sglang.multimodal_gen.runtime.platforms import plugins

    before = dict(ModelRegistry.registered_models)
    for arch in ("AutoencoderKLQwenImage", "AutoencoderKLWan"):
        assert "sglang" in ModelRegistry.registered_models[arch].module_name
    plugins._reset_lifecycle_for_tests()
    yield ModelRegistry
    ModelRegistry.registered_models.clear()
    ModelRegistry.registered_models.update(before)
    plugins._reset_lifecycle_for_tests()


@pytest.fixture
def serve(registry: Any, model_folder: Path) -> Iterator[Callable[..., Any]]:
    """serve(*flags) -> the ServerArgs that SGLang's own parser makes of them, with paravae registered by its plugin."""
    from sglang.multimodal_gen.runtime import server_args
    from sglang.multimodal_gen.runtime.platforms.plugins import load_plugins

    def parse(*flags: str, model: Path = model_folder) -> Any:
        load_plugins()
        args = server_args.prepare_server_args(["--model-path", str(model), *flags])
        server_args.set_global_server_args(args)
        return args

    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield parse
    root.handlers[:], root.level = handlers, level  # which SGLang sets for a server
    server_args.set_global_server_args(None)
