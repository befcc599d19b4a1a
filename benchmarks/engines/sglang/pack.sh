#!/usr/bin/env bash
# SGLang 0.5.23 for a Hopper host without network: Python 3.12, CUDA 13 with nvcc and g++,
# torch 2.11, triton 3.6, transformers 5.
#   pack.sh DIR     makes DIR/1, under 40 MB; `bash DIR/1/unpack.sh` there puts it all in /tmp/site
# tvm-ffi comes from a FlashInfer pack unpacked beside it. README.md tells what is put together from
# where, and why.
set -euo pipefail
here=$(mkdir -p "$1" && cd "$1" && pwd)
tmp=${WORK:-$(mktemp -d)}
mkdir -p "$tmp"/{big,wheels,new,old} "$here/1"
rm -rf "$tmp/site"
mkdir "$tmp/site"
cd "$tmp"

get() { # FOLDER REQUIREMENT..
  local to=$1 platforms=() version
  shift
  for version in _2_34 _2_31 _2_28 _2_27 _2_26 _2_24 _2_17 2014 1; do
    platforms+=(--platform "manylinux${version}_x86_64")
  done
  python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 \
    --implementation cp "${platforms[@]}" -d "$to" "$@"
}

[ -f big/sglang-0.5.23-*.whl ] || get big sglang==0.5.23
[ -f big/sglang_kernel-0.4.10-*.whl ] || get big sglang-kernel==0.4.10
[ -f big/sglang_kernel-0.4.5-*.whl ] || get big sglang-kernel==0.4.5
get wheels annotated-types==0.8.0 compressed-tensors==0.20.0 dill==0.4.1 fastapi==0.136.3 \
  gguf==0.19.0 httpx2==2.16.2 ipython==9.18.1 jsonschema==4.26.0 \
  jsonschema-specifications==2025.9.1 loguru==0.7.3 msgspec==0.22.0 openai==3.54.0 \
  orjson==3.11.4 partial-json-parser==0.2.1.1.post7 platformdirs pybase64==1.5.1 \
  pydantic==2.14.3 pydantic-core==2.50.4 python-multipart==0.0.34 pyzmq==27.3.0 \
  referencing==0.37.0 rpds-py==2026.9.1 setproctitle==1.3.8 sniffio==1.3.1 starlette==1.10.0 \
  traitlets==5.16.1 typing-inspection==0.4.5 uvicorn==0.54.0 xgrammar==0.2.8

cd site
for w in ../wheels/*.whl; do unzip -q -o "$w"; done
unzip -q -o ../big/sglang-0.5.23-*.whl \
  -x 'sglang/multimodal_gen/*' 'sglang/test/*' 'sglang/srt/rust_extensions/*.so' \
  'sglang/srt/mem_cache/rust_tree_core/*.so' # built for torch 2.14; there is one in Python
unzip -q -o ../big/sglang_kernel-0.4.10-*.whl \
  'sgl_kernel/*.py' 'triton_kernels/*' 'sglang_kernel-0.4.10.dist-info/*'
# 0.4.10's libraries are built for torch 2.14.
unzip -q -o ../big/sglang_kernel-0.4.5-*.whl 'sgl_kernel/sm90/*' 'sgl_kernel/spatial_ops*'
find . -name '*.pyi' -delete
rm -rf share bin

# FlashInfer is there for this package's kernel only; its norms and sampling are not compiled ahead.
sed -i -E 's/^    import flashinfer\.(norm|sampling) as .*/    raise ImportError/' \
  sgl_kernel/{elementwise,sampling}.py
# triton_kernels is written for a later triton; these are all it lacks in triton 3.6.
lacking='@triton.constexpr_function\ndef is_hip_gfx1250():\n    return False\n\n\n'
sed -i "/^    is_hip_gfx1250,\$/d; s/^__all__ = \[/$lacking&/" triton_kernels/target_info.py
sed -i '/def_file_line_number\|def_file_col_number/d' triton_kernels/specialize.py
echo '"""Stand-in: the server imports it for audio only."""' > soundfile.py
grep -q 'def is_hip_gfx1250' triton_kernels/target_info.py
if grep 'import flashinfer' sgl_kernel/{elementwise,sampling}.py; then
  echo "sgl_kernel still asks for FlashInfer: it is written otherwise than this script expects" >&2
  exit 1
fi

tar -cf - . | xz -T2 -6 > "$here/1/sglang.tar.xz"
cat > "$here/1/unpack.sh" <<'S'
d=$(cd "$(dirname "$0")" && pwd)
mkdir -p /tmp/site
xz -dc -T4 "$d/sglang.tar.xz" | tar -xf - -C /tmp/site
# A cold import takes a minute, a compiled one seconds.
python3 -m compileall -q -j 16 /tmp/site > /dev/null 2>&1
true
S
du -sm "$here/1"
