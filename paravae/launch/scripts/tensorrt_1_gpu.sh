#!/usr/bin/env bash
# A command with TensorRT engines on one GPU. What no engine can run, PyTorch does; the log says what and why.
#
# usage: tensorrt_1_gpu.sh decode|encode|bench [FLAGS]
#
# The preset takes static engines from ./engines, as `paravae engine build --output engines` puts them there. Flags go
# before it: --vae-config-file qwen_image_i2i_multi_profile, --vae-config.trt-vae-config.trt-engine-path DIR ...
# PYTHON: the interpreter to use (default: python3).
set -euo pipefail

if [[ $# -lt 1 || $1 == -* ]]; then
  echo "usage: $(basename "$0") decode|encode|bench [FLAGS]" >&2
  exit 2
fi
command=$1
shift
exec "${PYTHON:-python3}" -m paravae "$command" --vae-config-file qwen_image_t2i_static --dtype float16 "$@"
