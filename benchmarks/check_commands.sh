#!/usr/bin/env bash
# paravae encode, then decode on 1 and on N GPUs in every mode; the pictures must agree (exact modes to one level).
#   bash benchmarks/check_commands.sh N
set -euo pipefail
ranks=${1:?usage: bash benchmarks/check_commands.sh N}
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
picture=$($python -c 'from matplotlib.cbook import get_sample_data as f; print(f("grace_hopper.jpg", asfileobj=False))')
"$python" -m paravae encode --input "$picture" --output "$work/z.safetensors"
"$python" -m paravae decode --latents "$work/z.safetensors" --output "$work/single.png"
for mode in patch tiled auto; do
  "$python" -m torch.distributed.run --standalone --nproc-per-node "$ranks" -m paravae decode \
    --latents "$work/z.safetensors" --output "$work/$mode.png" \
    --vae-config.use-parallel-decode --vae-config.parallel-decode-mode "$mode"
done
# Bad input on every rank: a message and a status, not a hang.
if timeout 60 "$python" -m torch.distributed.run --standalone --nproc-per-node "$ranks" -m paravae decode \
  --latents "$work/none.safetensors" --output "$work/none.png" --vae-config.use-parallel-decode 2>"$work/errors"; then
  echo "a missing file was not refused" && exit 1
fi
grep "paravae: error" "$work/errors"
"$python" - "$work" <<'PY'
import sys
import numpy as np
from PIL import Image
load = lambda name: np.asarray(Image.open(f"{sys.argv[1]}/{name}.png")).astype(int)
single = load("single")
for mode in ("patch", "tiled", "auto"):
    difference = np.abs(load(mode) - single)
    print(f"{mode}: largest difference {difference.max()} of 255, in {(difference > 0).mean():.6%} of the values")
    assert mode == "tiled" or (difference.max() <= 1 and (difference > 0).mean() <= 1e-4)
PY
