"""paravae's package metadata; the tools' settings stand in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
version = re.search(r'__version__ = "(.+)"', (here / "paravae/__init__.py").read_text(encoding="utf-8")).group(1)

video = ["imageio-ffmpeg>=0.4.9"]
diffusers = ["diffusers>=0.42", "transformers>=5", "accelerate>=1.1"]
tensorrt = [
    "onnx>=1.19",
    "onnxruntime>=1.22",
    "onnxscript>=0.5",
    "tensorrt-rtx-cu13-bindings>=1.7; platform_system == 'Linux' and platform_machine == 'x86_64'",
    "tensorrt-rtx-cu13-libs>=1.7; platform_system == 'Linux' and platform_machine == 'x86_64'",
]
test = [
    "accelerate>=1.1",
    "diffusers==0.42.0",
    "distvae==0.1.0",
    "hypothesis>=6.100",
    "mypy>=1.10",
    "pytest>=8",
    "pytest-timeout>=2.3",
    "ruff>=0.6",
    "transformers>=5",
    "triton>=3.4; platform_system == 'Linux'",
    *tensorrt,
    *video,
]
train = ["scikit-image>=0.22", "scikit-learn>=1.4"]
sglang = ["sglang[diffusion]==0.5.23"]
bench = ["diffusers>=0.42", "distvae==0.1.0", *train]

setup(
    name="paravae",
    version=version,
    description="Parallel VAE decode for Qwen-Image and Wan 2.1: one GPU or many, the same pixels",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["paravae", "paravae.*"]),
    package_data={
        "paravae": [
            "py.typed",
            "assets/paravae-tiny/*",
            "configs/presets/*.json",
            "launch/scripts/*.sh",
            "layers/*.cu",
            "layers/*.cuh",
            "vae/machines.json",
        ]
    },
    install_requires=[
        "torch>=2.6",
        "safetensors>=0.4.3",
        "huggingface_hub>=0.25",
        "numpy>=1.26",
        "pillow>=10.1",
        "pyyaml>=6.0",
        "rich>=13.7",
        "matplotlib>=3.8",
        "typing_extensions>=4.8",
    ],
    extras_require={
        "bench": bench,
        "diffusers": diffusers,
        "sglang": sglang,
        "tensorrt": tensorrt,
        "test": test,
        "train": train,
        "video": video,
    },
    entry_points={
        "console_scripts": ["paravae = paravae.launch.cli:main"],
        "sglang.multimodal_gen.plugins": ["paravae = paravae.integrations.sglang_plugin:register"],
    },
)
