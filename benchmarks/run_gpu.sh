#!/usr/bin/env bash
# Everything that needs GPUs, in one go: the cuda and nccl tests, the commands under torchrun, everything timed.
#   bash benchmarks/run_gpu.sh OUTPUT_FOLDER
# Needs torch with CUDA, pytest, pytest-timeout and diffusers, for the comparison on several GPUs distvae too (without
# it its rows say so); uses up to four GPUs of this host.
set -uo pipefail
out=${1:?usage: bash benchmarks/run_gpu.sh OUTPUT_FOLDER}
mkdir -p "$out"
python=${PYTHON:-python3}
# ONLY=regex runs the steps whose names match; SGLANG=folder (benchmarks/fetch_sglang.sh) times SGLang's class too.
gpus=$($python -c 'import torch; print(min(4, torch.cuda.device_count()))')
on() { ranks=$1; shift; "$python" -m torch.distributed.run --standalone --nproc-per-node "$ranks" "$@"; }
failed=0
step() { name=$1; shift; [[ $name =~ ${ONLY:-.} ]] || return 0; echo "== $name"; SECONDS=0; "$@" >"$out/$name.log" 2>&1 || { failed=1; echo "FAILED: $name"; tail -n 60 "$out/$name.log"; }; echo "   $SECONDS s"; }

step tests_cuda "$python" -m pytest -q -rs -p no:cacheprovider tests/test_cuda.py --durations 5 -s
step tests_kernels "$python" -m pytest -q -rs -p no:cacheprovider tests/test_layers.py tests/test_fused_conv.py tests/test_hopper_attention.py tests/test_modulation.py tests/test_modulation_torch.py tests/test_modulation_input.py tests/test_fuse_transformer.py tests/test_fuse_transformer_around.py tests/test_custom_op.py tests/test_dispatch.py tests/test_trt_stream.py --durations 5
[ "$gpus" -lt 2 ] || step tests_nccl "$python" -m pytest -q -rs -p no:cacheprovider tests/test_nccl.py tests/test_nccl_fast.py tests/test_nccl_killed.py --durations 5
[ "$gpus" -lt 2 ] || step commands bash benchmarks/check_commands.sh "$gpus"
step tiling "$python" -m benchmarks.tiling --output "$out/tiling.json"
for ranks in 1 2 4; do
  [ "$ranks" -gt "$gpus" ] || step "scaling_$ranks" on "$ranks" -m benchmarks.scaling ${SGLANG:+--sglang "$SGLANG"} --minutes 6 --output "$out/scaling_$ranks.json"
done
[ "$gpus" -lt 2 ] || step calibrate on "$gpus" -m paravae bench calibrate --output "$out/calibration.json"
step parts "$python" -m benchmarks.parts --output "$out/parts.json"
step modulation "$python" -m benchmarks.modulation ${SGLANG:+--sglang "$SGLANG"} --minutes 5 --output "$out/modulation.json"
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | head -n 1)
[ -z "$sanitizer" ] || step memcheck env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool memcheck --error-exitcode 9 "$python" -m benchmarks.memcheck_modulation
step single_gpu "$python" -m benchmarks.single_gpu --peers diffusers ${SGLANG:+--sglang "$SGLANG"} --minutes 9 --output "$out/single_gpu.json"
"$python" -m benchmarks.gpu_summary "$out" "$gpus"
exit $failed
