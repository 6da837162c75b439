#!/usr/bin/env bash
# Lay out in FOLDER what benchmarks/sglang_import.py imports of SGLang: the part of its wheel that its VAE reaches, and
# the small packages it needs. Nothing is installed; FOLDER is read as it lies.
#   benchmarks/fetch_sglang.sh FOLDER [PYTHON_VERSION of the machine that will run it, default 3.12]
set -euo pipefail

folder=${1:?usage: fetch_sglang.sh FOLDER [PYTHON_VERSION]}
python_version=${2:-3.12}
python=${PYTHON:-python3}
sglang=0.5.23
wheels=$(mktemp -d)
trap 'rm -rf "$wheels"' EXIT

platforms=()
for glibc in 34 28 24 17; do
    platforms+=(--platform "manylinux_2_${glibc}_x86_64")
done
"$python" -m pip download --quiet --no-deps --only-binary=:all: --implementation cp \
    --python-version "$python_version" "${platforms[@]}" --platform manylinux2014_x86_64 --dest "$wheels" \
    "sglang==$sglang" msgspec==0.22.0 psutil==7.2.2 einops==0.8.2

rm -rf "$folder"
mkdir -p "$folder"
"$python" - "$wheels" "$folder" <<'PYTHON'
import sys
import zipfile
from pathlib import Path

GEN = "sglang/multimodal_gen/"
RUNTIME = GEN + "runtime/"
KEPT = (
    "sglang/__init__.py",
    "sglang/_version.py",
    "sglang/version.py",
    "sglang/kernels/__init__.py",
    *(
        f"sglang/kernels/{name}.py"
        for name in ("fused_op", "kernel_api_logging", "numerics", "registry", "selector", "spec")
    ),
    "sglang/kernels/jit/__init__.py",
    "sglang/kernels/jit/csrc/elementwise/",
    "sglang/kernels/jit/include/",
    "sglang/kernels/jit/utils/",
    "sglang/kernels/kda_kernels/",
    "sglang/kernels/ops/activation/",
    "sglang/kernels/ops/diffusion/",
    GEN + "__init__.py",
    GEN + "envs.py",
    GEN + "configs/models/base.py",
    GEN + "configs/models/vaes/",
    GEN + "third_party/",
    *(
        RUNTIME + part
        for part in (
            "cache/",
            "disaggregation/__init__.py",
            "disaggregation/roles.py",
            "distributed/",
            "layers/__init__.py",
            "layers/activation.py",
            "layers/custom_op.py",
            "layers/parallel_conv.py",
            "loader/utils.py",
            "managers/memory_managers/",
            "models/__init__.py",
            "models/vaes/",
            "platforms/",
            "utils/",
            "weights/",
        )
    ),
    "sglang/srt/arg_groups/",
    "sglang/srt/environ.py",
    "sglang/srt/observability/",
    "sglang/srt/platforms/",
    "sglang/srt/plugins/",
    "sglang/srt/runtime_context.py",
    "sglang/srt/utils/",
)


def wanted(name: str) -> bool:
    if not name.startswith("sglang"):
        return True
    if ".dist-info/" in name:
        return name.endswith(("/METADATA", "/LICENSE", "/WHEEL"))
    return name.startswith(KEPT) and not name.endswith((".so", ".pyd"))


folder = Path(sys.argv[2])
for wheel in sorted(Path(sys.argv[1]).glob("*.whl")):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder, [name for name in archive.namelist() if wanted(name)])
PYTHON
du -sh "$folder"
