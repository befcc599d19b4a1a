#!/usr/bin/env bash
# DeepSeek-V4 engines, stock backends beside this package:  run.sh [RESULTS]. See README.md.
#   LIMIT=170             seconds at most
#   MODES="dsv4_marlin,dsv4_ours"   see engines/vllm/engine.py
#   AT_ONCE=2             engines on a GPU
#   LAYERS=2 RATIOS=0,0 HASH=1      the checkpoint, see make_checkpoint.py
#   SKIP_WARM=1           where an earlier run has compiled the kernels
#   WORK, DSV4_TOKENS, DSV4_TP, TL_CACHE: see prepare.sh
began=$SECONDS
cd "$(dirname "$0")/../../.." || exit
. benchmarks/engines/deepseek_v4/prepare.sh
results=${1:-$work/results}
checkpoint=$work/deepseek-v4
mkdir -p "$results"

elapsed() { echo $((SECONDS - began)); }

# The checkpoint lies in memory where there is room: it is written once and read by every engine.
shm=$(df -Pm /dev/shm 2>/dev/null | awk 'NR==2{print $4}')
if [ "${shm:-0}" -gt 16000 ] && [ ! -e "$checkpoint" ]; then
  mkdir -p /dev/shm/dsv4ck
  ln -s /dev/shm/dsv4ck "$checkpoint"
fi

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
  [ -f "$checkpoint/config.json" ] || python3 benchmarks/engines/deepseek_v4/make_checkpoint.py \
    "$checkpoint" "${LAYERS:-2}" --ratios "${RATIOS:-0,0}" --hash "${HASH:-1}"
) > "$log/make.log" 2>&1 &
make=$!
[ -n "${SKIP_WARM:-}" ] || warm
wait $make
cat "$log/make.log"
echo "warm and checkpoint: $(elapsed) s"

left=$((${LIMIT:-170} - 2 - $(elapsed)))
python3 benchmarks/engines/vllm/run.py "$work" "$results/vllm-deepseek-v4.json" --limit $left \
  --modes "${MODES:-dsv4_marlin,dsv4_ours}" --at-once "${AT_ONCE:-2}"
for file in "$log"/*.log "$work"/*.log; do
  grep -hE 'Using .*(backend|Backend|MoE|Moe)|Selected |fp8_ds_mla|hopper_mxfp4' "$file" |
    sed 's/.*\] //' | sort -u | cut -c1-200 | head -12
  tail -c 60000 "$file" > "$results/$(basename "$file")"
done
echo "all: $(elapsed) s"
