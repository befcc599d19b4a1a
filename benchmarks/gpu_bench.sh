#!/usr/bin/env bash
# On a Hopper GPU: the tests of tactics, tuning, host overhead and the benchmark, each step cut off
# at its limit.
#
#   OUT=folder benchmarks/gpu_bench.sh [STEP..]     without steps: tests tune host bench
#
#   tests      of FlashInfer's tactics
#   tune       the three workloads, TUNE_S seconds each
#   shards     tune for their TP shards, at few sizes
#   host       what a call costs the host
#   bench      the three workloads, BENCH_S seconds each
#   skewed     bench with skewed routing, at few sizes
#   autotuned  FlashInfer with its own autotuner beside our tactics, at the sizes where that
#              takes a minute a point
#   invariant  what batch invariance costs
#
# WORKLOADS names other workloads. Results go to $OUT as they are measured, so that a run that is
# cut off leaves what it has. Tables that tune finds go to HOPPER_MXFP4_CACHE_DIR, by default
# $OUT/cache, where the steps after it find them.
set -uo pipefail
: "${OUT:?set OUT to a folder}"
mkdir -p "$OUT"
export HOPPER_MXFP4_CACHE_DIR="${HOPPER_MXFP4_CACHE_DIR:-$OUT/cache}"
export VLLM_LOGGING_LEVEL=WARNING COLUMNS=200
workloads="${WORKLOADS:-gpt-oss-20b dsv4-flash gpt-oss-120b}"
cli="python3 -m hopper_mxfp4"
# vLLM's first import compiles byte code for half a minute. The steps that don't need vLLM run
# meanwhile; those that time its kernels wait.
layers=vllm.model_executor.layers
nice python3 -c "import vllm.engine.arg_utils, $layers.fused_moe, $layers.quantization.mxfp4" \
  >"$OUT/import.log" 2>&1 &

measure() { # NAME SECONDS TAIL COMMAND..: into NAME.log, cut off a minute after its own limit
  local name=$1 seconds=$2 lines=$3
  shift 3
  timeout $((seconds + 60)) "$@" >"$OUT/$name.log" 2>&1
  tail -n "$lines" "$OUT/$name.log"
}

bench() { # NAME SECONDS TAIL OPTIONS..: every workload into NAME-WORKLOAD.json
  local name=$1 seconds=$2 lines=$3
  shift 3
  for workload in $workloads; do
    measure "$name-$workload" "$seconds" "$lines" \
      $cli bench --workloads "$workload" --budget "$seconds" --json "$OUT/$name-$workload.json" "$@"
  done
}

for step in ${*:-tests tune host bench}; do
  case $step in
    tests)
      measure tests 90 25 python3 -m pytest tests/gpu/test_flashinfer_tactics.py -q \
        --gpu-results "$OUT/gpu-tactics.json" ;;
    tune)
      for workload in $workloads; do
        measure "tune-$workload" "${TUNE_S:-120}" 30 \
          $cli tune --workloads "$workload" --budget "${TUNE_S:-120}" \
          --out "$OUT/tune-$workload.json"
      done ;;
    shards)
      for workload in $workloads; do
        shards="$workload-tp2 $workload-tp4 $workload-tp8"
        measure "shards-$workload" "${TUNE_S:-90}" 50 \
          $cli tune --workloads "$shards" --tokens "1 4 16 64 128 256 512 1024 2048 4096 8192" \
          --budget "${TUNE_S:-90}" --out "$OUT/shards-$workload.json"
      done ;;
    host)
      measure host 60 8 \
        $cli bench --host --workloads "gpt-oss-20b dsv4-flash" --json "$OUT/bench-host.json" ;;
    bench)
      wait
      bench bench "${BENCH_S:-120}" 40 ;;
    skewed)
      wait
      bench skewed "${BENCH_S:-60}" 20 --routing skewed \
        --kernels "ours flashinfer-default vllm" --tokens "1 4 16 64 256 1024 4096" ;;
    autotuned)
      bench autotuned "${BENCH_S:-120}" 20 \
        --kernels "ours-flashinfer flashinfer-autotuned" --tokens "256 512 1024 2048 4096 8192" ;;
    invariant)
      bench invariant "${BENCH_S:-40}" 20 --deterministic \
        --kernels "ours-native ours-flashinfer" --tokens "1 4 16 64 256 1024 4096 8192" ;;
    *)
      echo "no step is called $step; there are" \
        "tests, tune, shards, host, bench, skewed, autotuned and invariant" >&2
      exit 2 ;;
  esac
done
wait
