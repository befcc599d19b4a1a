#!/usr/bin/env bash
# What servers that prefill and decode apart need beside pack.sh's: NIXL and Mooncake, which carry
# the KV cache, and SGLang's router. For Python 3.12 and CUDA 13; neither needs RDMA.
#   pack_transfer.sh DIR     makes DIR/2, about 50 MB; `bash DIR/2/unpack.sh` there, into /tmp/site
set -euo pipefail
here=$(mkdir -p "$1" && cd "$1" && pwd)
tmp=${WORK:-$(mktemp -d)}
mkdir -p "$tmp/transfer" "$here/2"
rm -rf "$tmp/transfer_site"
mkdir "$tmp/transfer_site"
cd "$tmp"

get() { # REQUIREMENT..
  local platforms=() version
  for version in _2_34 _2_28 _2_17 2014; do
    platforms+=(--platform "manylinux${version}_x86_64")
  done
  python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 \
    --implementation cp "${platforms[@]}" -d transfer "$@"
}

get nixl==1.5.1 nixl-cu13==1.5.1 mooncake-transfer-engine-cuda13==0.3.14 sglang-router==0.3.2
cd transfer_site
for w in ../transfer/*.whl; do unzip -q -o "$w"; done
# Of NIXL what its UCX backend needs; object stores and expert parallelism are other things.
curl=$(ls -d nixl_cu13.libs/libcurl-*)
mv "$curl" libcurl.so.4
rm -rf nixl_ep nixl_ep_cu13 nixl_cu13.scripts nixl_cu13-*.data \
  nixl_cu13.libs/lib{aws,azure,s2n,xml2,gusli}* nixl_cu13.libs/ucx/libucx_perftest* \
  .nixl_cu13.mesonpy.libs/lib{obj_utils,nixl_test_utils}.so
find . -path '*plugin*' -name '*.so' ! -name 'libplugin_UCX.so' -delete
# Of Mooncake the transfer engine alone, and of NIXL's libraries those it takes from the system:
# verbs it loads even where TCP carries everything.
(
  cd mooncake
  rm -rf _store* _ep* libmooncake_* mooncake_client mooncake_master transfer_engine_bench \
    nvlink_allocator.so mooncake_ep_jit _pg_jit reshard store
  for name in ibverbs mlx5 nl-3 nl-route-3 numa zstd; do
    for file in ../nixl_cu13.libs/lib"$name"-[0-9a-f]*.so*; do
      ln -s "$file" .
      case $name in ibverbs | mlx5 | numa) ln -s "$file" "lib$name.so.1" ;; esac
    done
  done
)
ls mooncake/lib{ibverbs,mlx5,numa}.so.1 mooncake/engine.so nixl_cu13/_bindings*.so > /dev/null

tar -cf - . | xz -T2 -6 > "$here/2/transfer.tar.xz"
cat > "$here/2/unpack.sh" <<'S'
d=$(cd "$(dirname "$0")" && pwd)
mkdir -p /tmp/site
xz -dc -T4 "$d/transfer.tar.xz" | tar -xf - -C /tmp/site
# Mooncake's metadata client is linked with it and not used here: the system's own where it has one.
if ldconfig -p | grep -q 'libcurl\.so\.4 '; then
  rm /tmp/site/libcurl.so.4
else
  mv /tmp/site/libcurl.so.4 /tmp/site/mooncake/
fi
true
S
du -sm "$here/2"
