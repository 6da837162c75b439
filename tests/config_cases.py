"""A config, and where the files lie, for the tests of config files."""

from __future__ import annotations

from pathlib import Path

from paravae import QwenImageVAEConfig
from paravae.configs import TrtVAEConfig

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "paravae" / "launch" / "scripts"

STATED = QwenImageVAEConfig(
    use_parallel_decode=True,
    memory_limit_gib=2.0,
    vae_type="tensorrt",
    trt_vae_config=TrtVAEConfig(trt_engine_path="my engines", multi_profile=True, warm_up=("64x32", "1664x928")),
)


def written(folder: Path, text: str | bytes, name: str = "vae.json") -> str:
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(folder / name)
