#!/usr/bin/env bash
# What vLLM 0.33.0's DeepSeek-V4 needs on SM90 beyond vLLM's own wheel and requirements, for a
# Hopper host without network: Python 3.12, CUDA 13, torch 2.11 or later, vLLM itself in /tmp/site.
#   pack.sh DIR, then bash DIR/N/unpack.sh there
#   1/     TileLang 0.1.12 (mHC kernels) with z3 and tvm-ffi 0.1.11; FlashMLA; DeepGEMM with the
#          headers its JIT compiles against
#   2/ 3/  only for layers of compress ratio 4 or 128, whose compressor has no other way on CUDA:
#          nvidia-cutlass-dsl 4.8.0. CUTLASS_DSL=0 leaves them out.
set -euo pipefail
here=$(mkdir -p "$1" && cd "$1" && pwd)
tmp=$(mktemp -d)
mkdir -p "$tmp"/{wheels,pack} "$here"/{1,2,3}
cd "$tmp"

download() {
  python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 "$@"
}

get() { # REQUIREMENT..: into wheels
  local platforms=() version
  for version in _2_34 _2_31 _2_28 _2_27 _2_24 _2_17 2014; do
    platforms+=(--platform "manylinux${version}_x86_64")
  done
  download --implementation cp "${platforms[@]}" -d wheels "$@"
}

download --platform manylinux_2_28_x86_64 -d . vllm==0.33.0
get tilelang==0.1.12 apache-tvm-ffi==0.1.11 torch-c-dlpack-ext==0.1.5 ml-dtypes \
  cloudpickle==3.1.2 psutil z3-solver==4.15.4.0
cd pack
unzip -q ../vllm-0.33.0-*.whl \
  'vllm/_flashmla*.so' 'vllm/_deepselect_C*.so' 'vllm/third_party/deep_gemm/*'
for w in ../wheels/*.whl; do unzip -q -o "$w"; done
rm -rf tilelang/3rdparty/composable_kernel z3/lib/libz3.so z3/bin z3/include
ln -s libz3.so.4.15 z3/lib/libz3.so
tar -cf - . | xz -T2 -5 > "$here/1/dsv4.tar.xz"
cat > "$here/1/unpack.sh" <<'S'
# TileLang 0.1.12 takes no tvm-ffi later than 0.1.11 (vLLM's pin), so that one replaces any other.
d=$(cd "$(dirname "$0")" && pwd)
mkdir -p /tmp/site
rm -rf /tmp/site/tvm_ffi /tmp/site/apache_tvm_ffi-*
xz -dc -T4 "$d/dsv4.tar.xz" | tar -xf - -C /tmp/site
S

if [ "${CUTLASS_DSL:-1}" = 1 ]; then # the wheels as they are: compressing them anew gains little
  cd ..
  mkdir -p wheels_dsl
  download --implementation cp --platform manylinux_2_28_x86_64 -d wheels_dsl \
    nvidia-cutlass-dsl==4.8.0 nvidia-cutlass-dsl-libs-base==4.8.0 \
    nvidia-cutlass-dsl-libs-cu13==4.8.0 quack-kernels==0.6.5
  tar -C wheels_dsl -cf - . | split -b 48M - dsl.part.
  mv dsl.part.aa "$here/2/dsl.aa"
  mv dsl.part.ab "$here/3/dsl.ab"
  echo 'd=$(cd "$(dirname "$0")" && pwd); cp "$d/dsl.aa" /tmp/dsl.aa' > "$here/2/unpack.sh"
  cat > "$here/3/unpack.sh" <<'S'
d=$(cd "$(dirname "$0")" && pwd)
mkdir -p /tmp/dsl
cat /tmp/dsl.aa "$d/dsl.ab" | tar -xf - -C /tmp/dsl
python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
  --target /tmp/site /tmp/dsl/*.whl
S
fi
du -sm "$here"/[123]
