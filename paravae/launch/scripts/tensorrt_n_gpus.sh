#!/usr/bin/env bash
# A command with TensorRT engines on N GPUs of this host, each of which runs its own window of the picture.
# What no engine can run, PyTorch does, on all GPUs alike; the log says what and why.
#
# usage: tensorrt_n_gpus.sh N decode|encode|bench [FLAGS]
#
# The preset takes static engines from ./engines, here of the windows that N ranks have:
# `paravae engine build --output engines --for-parallel N` puts them there. Multi-profile engines take any window within
# their ranges: --vae-config-file qwen_image_i2i_multi_profile. Flags go before the preset.
# PYTHON: the interpreter to use (default: python3).
set -euo pipefail

if [[ $# -lt 2 || ! $1 =~ ^[1-9][0-9]*$ || $2 == -* ]]; then
  echo "usage: $(basename "$0") N decode|encode|bench [FLAGS]" >&2
  exit 2
fi
gpus=$1 command=$2
shift 2
exec "${PYTHON:-python3}" -m torch.distributed.run --standalone --nproc-per-node "$gpus" -m paravae "$command" \
  --vae-config-file qwen_image_t2i_static --dtype float16 --vae-config.use-parallel-decode "$@"
