#!/usr/bin/env bash
# Builds the images of deploy/Dockerfile where there is no container runtime, and runs them as Kubernetes would.
#
# usage: image_test.sh [TARGET…]    as root, after tests/run.sh; targets: cpu (the default), cpu-demo, cuda
#
# The base image is a fresh debootstrap of Debian 12 instead of a download from a registry. buildah runs every step of the
# Dockerfile in it with chroot isolation. Then the image's files are mounted read-only, and its entry point runs in them as
# the image's user, without capabilities, answers a kubelet's probes and one prompt, and drains. `cuda` takes the CUDA
# toolkit of this machine into its base (Debian's own is too old for sm_90a), and runs on the CPU: a GPU can't be had here.
# Takes ten minutes on two cores, cuda twenty; not part of tests/run.sh.
set -euo pipefail
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
[[ $(id -u) -eq 0 ]] || { echo "image_test.sh must run as root" >&2; exit 1; }
[[ $# -gt 0 ]] || set -- cpu
for tool in buildah debootstrap setpriv curl; do
  command -v "$tool" >/dev/null || { echo "$tool is missing: apt-get install buildah debootstrap util-linux curl" >&2; exit 1; }
done

work=${HEADSTART_IMAGE_WORK:-/var/tmp/headstart-image}
base=localhost/debian:12-slim
cuda_build_base=localhost/cuda:13-devel
cuda_base=localhost/cuda:13-base
python=${HEADSTART_CACHE:-$HOME/.cache/headstart}/venvs/tests/bin/python
[[ -x $python ]] || { echo "$python is missing: tests/run.sh makes it" >&2; exit 1; }
mkdir -p "$work/tmp"
export TMPDIR=$work/tmp
buildah() { command buildah --root "$work/root" --runroot "$work/run" --storage-driver vfs "$@"; }

has_image() { buildah images -q "$1" >/dev/null 2>&1; }

# Where this machine gets packages from, and whom it trusts for that, the build may too.
make_base() {
  local root=$work/debootstrap container mirror
  mirror=$(awk '/^URIs:/ {print $2; exit} /^deb /{for (i = 2; i <= NF; i++) if ($i ~ /^http/) {print $i; exit}}' \
    /etc/apt/sources.list.d/debian.sources /etc/apt/sources.list 2>/dev/null)
  echo "==> debootstrap bookworm from $mirror"
  rm -rf "$root"
  debootstrap --variant=minbase --include=ca-certificates bookworm "$root" "$mirror" >"$work/debootstrap.log"
  # In both places: an upgrade of ca-certificates makes the first anew, from its own and from the second.
  cp -L /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/"
  cp -L /etc/ssl/certs/ca-certificates.crt "$root/usr/local/share/ca-certificates/this-machine.crt"
  if [[ -f /etc/pip.conf ]]; then cp /etc/pip.conf "$root/etc/pip.conf"; fi
  rm -f "$root/etc/apt/sources.list"
  sed "s|@|$mirror|" >"$root/etc/apt/sources.list.d/debian.sources" <<'SOURCES'
Types: deb
URIs: @
Suites: bookworm bookworm-updates
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: @-security
Suites: bookworm-security
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
SOURCES
  container=$(buildah from scratch)
  buildah add -q "$container" "$root" / >/dev/null
  buildah commit -q "$container" "$base" >/dev/null
  buildah rm "$container" >/dev/null
  rm -rf "$root"
}

# make_cuda_base IMAGE PART…: the base with these parts of this machine's CUDA toolkit.
make_cuda_base() {
  local image=$1 toolkit container root
  shift
  toolkit=$(realpath "${CUDA_HOME:-/usr/local/cuda}")
  echo "==> $image from $toolkit"
  container=$(buildah from --pull-never "$base")
  root=$(buildah mount "$container")/usr/local/cuda
  mkdir -p "$root"
  (cd "$toolkit" && cp -rL --parents "$@" "$root")
  echo /usr/local/cuda/lib64 >"$root/../../../etc/ld.so.conf.d/cuda.conf"
  buildah umount "$container" >/dev/null
  buildah config --env "PATH=/usr/local/cuda/bin:/usr/sbin:/usr/bin:/sbin:/bin" "$container"
  buildah commit -q "$container" "$image" >/dev/null
  buildah rm "$container" >/dev/null
}

make_cuda_bases() {
  has_image "$cuda_build_base" || make_cuda_base "$cuda_build_base" bin include nvvm lib64/libcudart.so lib64/libcudart_static.a lib64/libcudadevrt.a \
    lib64/libcublasLt.so lib64/libcublasLt.so.13
  has_image "$cuda_base" || make_cuda_base "$cuda_base" lib64/libcublasLt.so.13
}

# inspect IMAGE TEMPLATE: a value of the image's configuration.
inspect() { buildah inspect --type image --format "$2" "$1"; }

check() {
  if "${@:2}"; then echo "ok: $1"; else echo "FAILED: $1" >&2; exit 1; fi
}

has_no_compiler() {
  local found
  found=$(find "$1"/usr/bin "$1"/usr/local \( -name 'gcc*' -o -name 'g++*' -o -name 'cc' -o -name 'c++*' -o -name 'ld' \
    -o -name 'ld.[bg]*' -o -name 'as' -o -name 'cmake*' -o -name 'ninja' -o -name 'nvcc' -o -name 'clang*' \) -print)
  [[ -z $found ]] || { echo "$found" >&2; return 1; }
}

has_no_headers() { [[ ! -d $1/usr/include || -z $(find "$1/usr/include" -type f -print -quit) ]]; }

# Mounts ROOT read-only with CONFIG in /etc/headstart, and MODEL, if any, as /models/model.
mount_as_pod() {
  local root=$1 config=$2 model=$3 name
  mount --bind "$root" "$root"
  mkdir -p "$root/etc/headstart"
  mount --bind "$config" "$root/etc/headstart"
  if [[ -n $model ]]; then
    mkdir -p "$root/models/model"
    mount --bind "$model" "$root/models/model"
  fi
  mount -t proc proc "$root/proc"
  for name in null zero urandom; do touch "$root/dev/$name"; mount --bind "/dev/$name" "$root/dev/$name"; done
  mount -o remount,bind,ro "$root"
}

# In namespaces of its own: starts COMMAND in the image's ROOT as USER, does what a kubelet and a client do, and ends it.
run_as_pod() {
  set -e
  local root=$1 config=$2 model=$3 user=$4 server as_user
  shift 4
  as_user=(chroot "$root" setpriv --reuid="${user%%:*}" --regid="${user##*:}" --clear-groups --bounding-set=-all
    --inh-caps=-all --no-new-privs)
  ip link set lo up
  mount_as_pod "$root" "$config" "$model"
  if touch "$root/tmp/written" 2>/dev/null; then echo "the root file system can be written" >&2; return 1; fi
  "${as_user[@]}" "$@" &
  server=$!
  timeout 120 bash -c 'until curl -sf http://127.0.0.1:9090/readyz >/dev/null; do sleep 0.2; done'
  curl -sf http://127.0.0.1:9090/healthz >/dev/null
  curl -sf http://127.0.0.1:9090/metrics | grep '^headstart_build_info'
  diff - <(grep -E '^(Uid|CapEff|NoNewPrivs):' "$root/proc/$server/status") <<PRIVILEGES
Uid:	${user%%:*}	${user%%:*}	${user%%:*}	${user%%:*}
CapEff:	0000000000000000
NoNewPrivs:	1
PRIVILEGES
  "${as_user[@]}" /usr/local/bin/headstart request --random 300:1
  kill -TERM "$server"
  wait "$server"
}

# starts_and_drains ROOT CONFIG MODEL USER COMMAND…: nothing of it outlives the namespaces.
starts_and_drains() {
  unshare --mount --net --pid --fork --kill-child bash -c \
    "$(declare -f mount_as_pod run_as_pod); run_as_pod \"\$@\"" run_as_pod "$@"
}

build() {
  local target=$1
  echo "==> building headstart:$target"
  buildah bud --isolation chroot --layers --target "$target" --build-arg "CPU_BASE=$base" \
    --build-arg "CUDA_BUILD_BASE=$cuda_build_base" --build-arg "CUDA_BASE=$cuda_base" --tag "headstart:$target" \
    --file "$repo/deploy/Dockerfile" "$repo" </dev/null
}

# A small model with random weights.
write_model() {
  rm -rf "$work/model"
  PYTHONPATH=$repo/tests/deploy "$python" -c \
    "import pathlib, sys, tiny_model; tiny_model.write_tiny_model(pathlib.Path(sys.argv[1]))" "$work/model"
  chmod 644 "$work/model"/*
}

test_image() {
  local target=$1 image=localhost/headstart:$1 container root user command config=$repo/deploy/kubernetes/base model=$work/model
  user=$(inspect "$image" '{{.OCIv1.Config.User}}')
  mapfile -t command < <(inspect "$image" \
    '{{range .OCIv1.Config.Entrypoint}}{{println .}}{{end}}{{range .OCIv1.Config.Cmd}}{{println .}}{{end}}' | grep .)
  container=$(buildah from --pull-never "$image")
  root=$(buildah mount "$container")
  echo "==> testing $image: $(du -sh --apparent-size "$root" | cut -f1), ${command[*]}"
  check "runs as 65532, not root" test "$user" = 65532:65532
  check "has no compiler" has_no_compiler "$root"
  check "has no headers" has_no_headers "$root"
  check "every library is there" chroot "$root" sh -c '! ldd /usr/local/bin/headstart | grep "not found"'
  if [[ $target == cpu-demo ]]; then
    config=$repo/deploy/kubernetes/overlays/cpu-demo
    model=''  # it has its own
  else
    write_model
  fi
  check "starts, passes its probes, answers, drains" starts_and_drains "$root" "$config" "$model" "$user" "${command[@]}"
  buildah umount "$container" >/dev/null
  buildah rm "$container" >/dev/null
}

has_image "$base" || make_base
for target in "$@"; do
  if [[ $target == cuda ]]; then make_cuda_bases; fi
  build "$target"
  test_image "$target"
done
