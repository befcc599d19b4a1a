#!/usr/bin/env bash
# DeepSeek-V4 engines, stock backends beside this package: run.sh [RESULTS], LIMIT=170 seconds at most. See README.md.
# MODES="marlin ours" (humming, flashinfer_cutlass); LAYERS=2 RATIOS=0,0 HASH=1 go to make_checkpoint.py; SKIP_WARM=1 where an earlier run has compiled the kernels;
# TL_CACHE=FILE.tgz brings TileLang kernels compiled elsewhere.
here=$(cd "$(dirname "$0")" && pwd); work=${WORK:-/tmp/dsv4}; results=${1:-$work/results}; site=$(python3 -c 'import vllm, pathlib; print(pathlib.Path(vllm.__file__).parents[1])')
export PYTHONPATH=$here/../../core:$here/../../adapters/vllm${PYTHONPATH:+:$PYTHONPATH}; mkdir -p $work/log; began=$SECONDS
shm=$(df -Pm /dev/shm 2>/dev/null | awk 'NR==2{print $4}'); [ "${shm:-0}" -gt 16000 ] && [ ! -e $work/checkpoint ] && mkdir -p /dev/shm/dsv4ck && ln -s /dev/shm/dsv4ck $work/checkpoint
export CUDA_HOME=${CUDA_HOME:-$(dirname "$(dirname "$(readlink -f "$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)")")")}; export PATH=$CUDA_HOME/bin:$PATH
export DG_JIT_CACHE_DIR=$work/deep_gemm TILELANG_CACHE_DIR=$work/tilelang TRITON_CACHE_DIR=$work/triton VLLM_CACHE_ROOT=$work/vllm
export VLLM_USE_DEEP_GEMM=1 VLLM_DEEP_GEMM_WARMUP=skip VLLM_BLOCKSCALE_FP8_GEMM_FLASHINFER=0 VLLM_USE_FLASHINFER_SAMPLER=0
export VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_ALLOW_INSECURE_SERIALIZATION=1 VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1 DSV4_MODEL=$work/checkpoint
export OMP_NUM_THREADS=4
if [ -n "${TL_CACHE:-}" ]; then  # a miss compiles as usual
  [ -d $work/tilelang ] || { mkdir -p $work/tilelang && tar -xzf "$TL_CACHE" -C $work/tilelang; }
  export TILELANG_DEFAULT_TARGET='{"kind": "cuda", "arch": "sm_90a"}'
fi
find $work/tilelang -name executable.so 2>/dev/null | sort > $work/log/tl_before
rm -f $work/*.json $work/*.pt
command -v gcc nvcc python3; nvcc --version | tail -1
python3 - <<'P'
import importlib.util as u, importlib.metadata as m
for n in ("apache-tvm-ffi", "tilelang", "torch", "triton", "transformers", "flashinfer-python", "hopper-mxfp4"):
    try: print(n, m.version(n), end="; ")
    except Exception: print(n, "MISSING", end="; ")
print({n: bool(u.find_spec(n)) for n in ("z3", "ml_dtypes", "cloudpickle", "psutil", "cutlass")})
P
( [ -f $work/checkpoint/config.json ] || python3 $here/make_checkpoint.py $work/checkpoint ${LAYERS:-2} --ratios ${RATIOS:-0,0} --hash ${HASH:-1} ) > $work/log/make.log 2>&1 & make=$!
if [ -z "${SKIP_WARM:-}" ]; then
  python3 -m compileall -q -j 16 $site/tilelang $site/vllm/model_executor $site/vllm/models/deepseek_v4 $site/vllm/models/deepseek_v41 $site/vllm/v1 $site/vllm/config $site/vllm/utils > /dev/null 2>&1
  echo "byte code: $((SECONDS - began)) s"; warm=
  for part in flashmla wqa_wkv wq_b wo_b shared_up shared_down wo_a mhc_first mhc_4 mhc_20 mhc_batch mhc_head; do
    timeout -k 2 85 python3 $here/engine.py warm $part > $work/log/warm_$part.log 2>&1 & warm="$warm $!"
  done
  wait $warm
  for f in $work/log/warm_*.log; do grep -h '^WARM' $f || { echo "WARM $f died:"; tail -c 500 $f; }; done
fi
wait $make; cat $work/log/make.log; echo "warm and checkpoint: $((SECONDS - began)) s; TileLang kernels before $(wc -l < $work/log/tl_before), now $(find $work/tilelang -name executable.so | wc -l); DeepGEMM $(find $work/deep_gemm -name "*.cubin" 2>/dev/null | wc -l)"
left=$((${LIMIT:-170} - 4 - (SECONDS - began))); modes=${MODES:-marlin ours}
for m in $modes; do
  ( timeout -k 3 $left python3 $here/engine.py $m $work/$m.json > $work/log/$m.log 2>&1; echo $? > $work/log/$m.rc ) &
done
wait
for m in $modes; do
  echo "== $m: exit $(cat $work/log/$m.rc) (124: out of time)"; grep -h '^DSV4' $work/log/$m.log | cut -c1-900
  grep -hE 'Using .*(backend|Backend|MoE|Moe)|Selected |fp8_ds_mla|hopper_mxfp4' $work/log/$m.log | sed 's/.*\] //' | sort -u | cut -c1-200 | head -12
  [ "$(cat $work/log/$m.rc)" = 0 ] || { grep -nE '^\S*(Error|Exception)|Error:|error:' $work/log/$m.log | tail -5 | cut -c1-400; tail -n 25 $work/log/$m.log | cut -c1-300; }
done
for a in $modes; do for b in $modes; do  # every pair once
  [[ $a < $b ]] && [ -f $work/$a.json ] && [ -f $work/$b.json ] && python3 $here/engine.py compare $work/$a.json $work/$b.json
done; done
mkdir -p "$results" && cp $work/*.json "$results/" 2>/dev/null; for f in $work/log/*.log; do tail -c 60000 $f > "$results/$(basename $f)"; done
echo "all: $((SECONDS - began)) s"
