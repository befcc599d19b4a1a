#!/usr/bin/env bash
# DeepSeek-V4 engines, stock backends beside this package:  run.sh [RESULTS]. See README.md.
#   LIMIT=170             seconds at most
#   MODES="marlin ours"   also humming, flashinfer_cutlass
#   LAYERS=2 RATIOS=0,0 HASH=1   the checkpoint, see make_checkpoint.py
#   SKIP_WARM=1           where an earlier run has compiled the kernels
#   TL_CACHE=FILE.tgz     TileLang kernels that were compiled elsewhere
#   WORK=/tmp/dsv4        checkpoint, caches and logs
began=$SECONDS
here=$(cd "$(dirname "$0")" && pwd)
root=$here/../../..
work=${WORK:-/tmp/dsv4}
log=$work/log
results=${1:-$work/results}
site=$(python3 -c 'import vllm, pathlib; print(pathlib.Path(vllm.__file__).parents[1])')
mkdir -p "$log"

elapsed() { echo $((SECONDS - began)); }

# The checkpoint lies in memory where there is room: it is written once and read by every engine.
shm=$(df -Pm /dev/shm 2>/dev/null | awk 'NR==2{print $4}')
if [ "${shm:-0}" -gt 16000 ] && [ ! -e "$work/checkpoint" ]; then
  mkdir -p /dev/shm/dsv4ck
  ln -s /dev/shm/dsv4ck "$work/checkpoint"
fi

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
export DSV4_MODEL=$work/checkpoint
if [ -n "${TL_CACHE:-}" ]; then # a kernel that is not in it is compiled as usual
  if [ ! -d "$work/tilelang" ]; then
    mkdir -p "$work/tilelang"
    tar -xzf "$TL_CACHE" -C "$work/tilelang"
  fi
  # The target is part of a kernel's key.
  export TILELANG_DEFAULT_TARGET='{"kind": "cuda", "arch": "sm_90a"}'
fi
tilelang_kernels() { find "$work/tilelang" -name executable.so 2>/dev/null | wc -l; }
tilelang_before=$(tilelang_kernels)
rm -f "$work"/*.json "$work"/*.pt

command -v gcc nvcc python3
nvcc --version | tail -1
python3 - <<'P'
import importlib.metadata as m
import importlib.util as u

for n in ("apache-tvm-ffi", "tilelang", "torch", "triton", "transformers", "flashinfer-python",
          "hopper-mxfp4"):
    try:
        print(n, m.version(n), end="; ")
    except Exception:
        print(n, "MISSING", end="; ")
print({n: bool(u.find_spec(n)) for n in ("z3", "ml_dtypes", "cloudpickle", "psutil", "cutlass")})
P

(
  [ -f "$work/checkpoint/config.json" ] || python3 "$here/make_checkpoint.py" \
    "$work/checkpoint" "${LAYERS:-2}" --ratios "${RATIOS:-0,0}" --hash "${HASH:-1}"
) > "$log/make.log" 2>&1 &
make=$!

if [ -z "${SKIP_WARM:-}" ]; then
  python3 -m compileall -q -j 16 "$site/tilelang" \
    "$site"/vllm/{model_executor,models/deepseek_v4,models/deepseek_v41,v1,config,utils} \
    > /dev/null 2>&1
  echo "byte code: $(elapsed) s"
  warm=()
  for part in flashmla wqa_wkv wq_b wo_b shared_up shared_down wo_a \
    mhc_first mhc_4 mhc_20 mhc_batch mhc_head; do
    timeout -k 2 85 python3 "$here/engine.py" warm $part > "$log/warm_$part.log" 2>&1 &
    warm+=($!)
  done
  wait "${warm[@]}"
  for f in "$log"/warm_*.log; do
    grep -h '^WARM' "$f" || { echo "WARM $f died:"; tail -c 500 "$f"; }
  done
fi
wait $make
cat "$log/make.log"
echo "warm and checkpoint: $(elapsed) s;" \
  "TileLang kernels before $tilelang_before, now $(tilelang_kernels);" \
  "DeepGEMM $(find "$work/deep_gemm" -name '*.cubin' 2>/dev/null | wc -l)"

left=$((${LIMIT:-170} - 4 - $(elapsed)))
modes=${MODES:-marlin ours}
for m in $modes; do
  (
    timeout -k 3 $left python3 "$here/engine.py" $m "$work/$m.json" > "$log/$m.log" 2>&1
    echo $? > "$log/$m.rc"
  ) &
done
wait
for m in $modes; do
  code=$(cat "$log/$m.rc")
  echo "== $m: exit $code (124: out of time)"
  grep -h '^DSV4' "$log/$m.log" | cut -c1-900
  grep -hE 'Using .*(backend|Backend|MoE|Moe)|Selected |fp8_ds_mla|hopper_mxfp4' "$log/$m.log" |
    sed 's/.*\] //' | sort -u | cut -c1-200 | head -12
  if [ "$code" != 0 ]; then
    grep -nE '^\S*(Error|Exception)|Error:|error:' "$log/$m.log" | tail -5 | cut -c1-400
    tail -n 25 "$log/$m.log" | cut -c1-300
  fi
done
for a in $modes; do
  for b in $modes; do # every pair once
    if [[ $a < $b ]] && [ -f "$work/$a.json" ] && [ -f "$work/$b.json" ]; then
      python3 "$here/engine.py" compare "$work/$a.json" "$work/$b.json"
    fi
  done
done
mkdir -p "$results"
cp "$work"/*.json "$results/" 2>/dev/null
for f in "$log"/*.log; do tail -c 60000 "$f" > "$results/$(basename "$f")"; done
echo "all: $(elapsed) s"
