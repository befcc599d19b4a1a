#!/usr/bin/env bash
# On a Hopper GPU: tests of tactics, tuning, host overhead and the benchmark, in about ten minutes, every step cut off at its limit.
#   OUT=folder scripts/gpu_bench.sh [STEP..]      steps: tests tune host bench (default: all)
# Everything is written to $OUT as it is measured, so that a run that is cut off leaves what it has.
set -uo pipefail
: "${OUT:?set OUT to a folder}"
mkdir -p "$OUT"
export HOPPER_MXFP4_CACHE_DIR="$OUT/cache" VLLM_LOGGING_LEVEL=WARNING COLUMNS=200
bodies="gpt-oss-20b gpt-oss-120b dsv4-flash"
cli="python3 -m hopper_mxfp4"
# vLLM's first import compiles its byte code for half a minute: meanwhile.
python3 -c 'import vllm.engine.arg_utils, vllm.model_executor.layers.fused_moe, vllm.model_executor.layers.quantization.mxfp4' >"$OUT/import.log" 2>&1 &

for step in ${*:-tests tune host bench}; do
  case $step in
    tests) timeout 150 python3 -m pytest tests/gpu/test_flashinfer_tactics.py -q --gpu-results "$OUT/gpu-tactics.json" 2>&1 | tee "$OUT/tests.log" | tail -25 ;;
    tune) timeout 190 $cli tune --bodies "${TUNE:-$bodies}" --budget "${TUNE_S:-150}" --out "$OUT/tactics.json" 2>&1 | tee "$OUT/tune.log" | tail -90 ;;
    host) timeout 60 $cli bench --host --bodies "gpt-oss-20b dsv4-flash" --json "$OUT/bench-host.json" 2>&1 | tee "$OUT/host.log" | tail -5 ;;
    bench)
      wait
      for body in ${BENCH:-$bodies}; do
        timeout $((${BENCH_S:-90} + 60)) $cli bench --bodies "$body" --deterministic --budget "${BENCH_S:-90}" --json "$OUT/bench-$body.json" 2>&1 | tee "$OUT/bench-$body.log" | tail -40
      done ;;
    *) echo "no step is called $step; there are tests, tune, host and bench" >&2; exit 2 ;;
  esac
done
wait
