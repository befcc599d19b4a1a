# What vLLM's DeepSeek-V4 engines need of their environment, and their kernels compiled ahead:
#   . benchmarks/engines/deepseek_v4/prepare.sh && warm
# in bash, from the repository's root, before run.sh's engines or `hopper-mxfp4 bench`. See the
# README.
#   WORK=/tmp/dsv4             checkpoint, caches and logs
#   DSV4_TOKENS="4 8 20 64"    numbers of tokens in a step for which to compile
#   DSV4_TP="1"                numbers of tensor-parallel ranks, such as "1 2"
#   OURS="dsv4-flash"          layers for which this package's kernels are compiled, see docs/cli.md
#   TL_CACHE=FILE.tgz          TileLang kernels that were compiled elsewhere
root=$PWD
work=${WORK:-/tmp/dsv4}
log=$work/log
mkdir -p "$log"

if [ -z "${CUDA_HOME:-}" ]; then
  nvcc=$(readlink -f "$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)")
  CUDA_HOME=$(dirname "$(dirname "$nvcc")")
fi
export CUDA_HOME PATH=$CUDA_HOME/bin:$PATH
export PYTHONPATH=$root/core:$root/adapters/vllm${PYTHONPATH:+:$PYTHONPATH}
export DG_JIT_CACHE_DIR=$work/deep_gemm TILELANG_CACHE_DIR=$work/tilelang
export TRITON_CACHE_DIR=$work/triton VLLM_CACHE_ROOT=$work/vllm
export VLLM_USE_DEEP_GEMM=1 VLLM_DEEP_GEMM_WARMUP=skip
export VLLM_BLOCKSCALE_FP8_GEMM_FLASHINFER=0 VLLM_USE_FLASHINFER_SAMPLER=0
export VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_ALLOW_INSECURE_SERIALIZATION=1
export VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1 OMP_NUM_THREADS=4
export DSV4_TOKENS=${DSV4_TOKENS:-4 8 20 64} DSV4_TP=${DSV4_TP:-1}
if [ -n "${TL_CACHE:-}" ]; then # a kernel that is not in it is compiled as usual
  if [ ! -d "$work/tilelang" ]; then
    mkdir -p "$work/tilelang"
    tar -xzf "$TL_CACHE" -C "$work/tilelang"
  fi
  # The target is part of a kernel's key.
  export TILELANG_DEFAULT_TARGET='{"kind": "cuda", "arch": "sm_90a"}'
fi
tilelang_kernels() { find "$work/tilelang" -name executable.so 2>/dev/null | wc -l; }

warm() {
  local part shape file before site warming=()
  before=$(tilelang_kernels)
  site=$(python3 -c 'import vllm, pathlib; print(pathlib.Path(vllm.__file__).parents[1])')
  python3 -m compileall -q -j 16 "$site/tilelang" \
    "$site"/vllm/{model_executor,models/deepseek_v4,models/deepseek_v41,v1,config,utils} \
    > /dev/null 2>&1
  for part in flashmla wqa_wkv wq_b wo_b shared_up shared_down wo_a mhc_first mhc_head \
    $(printf 'mhc_%s ' $DSV4_TOKENS); do
    timeout -k 2 "${WARM_LIMIT:-120}" \
      python3 "$root/benchmarks/engines/deepseek_v4/warm.py" "$part" \
      > "$log/warm_$part.log" 2>&1 &
    warming+=($!)
  done
  for shape in ${OURS:-dsv4-flash}; do
    for part in native native8; do
      python3 -m hopper_mxfp4 warmup --kernel $part --workloads "$shape" \
        > "$log/ours_$part-$shape.log" 2>&1 &
      warming+=($!)
    done
  done
  wait "${warming[@]}"
  tail -qn 1 "$log"/ours_*.log
  for file in "$log"/warm_*.log; do
    grep -h '^WARM' "$file" || { echo "WARM $file died:"; tail -c 500 "$file"; }
  done
  echo "TileLang kernels before $before, now $(tilelang_kernels);" \
    "DeepGEMM $(find "$work/deep_gemm" -name '*.cubin' 2>/dev/null | wc -l)"
}
