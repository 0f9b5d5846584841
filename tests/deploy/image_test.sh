#!/usr/bin/env bash
# Builds the CPU images of deploy/Dockerfile where there is no container runtime, and runs them as Kubernetes would.
#
# usage: image_test.sh [TARGET…]    as root; targets: cpu (the default), cpu-demo
#
# The base image is a fresh debootstrap of Debian 12 instead of a download from a registry. buildah runs every step of the
# Dockerfile in it with chroot isolation. Then the image's files are mounted read-only, and its entry point runs in them as
# the image's user, without capabilities. Takes about ten minutes on two cores; not part of tests/run.sh.
set -euo pipefail
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
[[ $(id -u) -eq 0 ]] || { echo "image_test.sh must run as root" >&2; exit 1; }
[[ $# -gt 0 ]] || set -- cpu
for tool in buildah debootstrap setpriv curl; do
  command -v "$tool" >/dev/null || { echo "$tool is missing: apt-get install buildah debootstrap util-linux curl" >&2; exit 1; }
done

work=${HEADSTART_IMAGE_WORK:-/var/tmp/headstart-image}
base=localhost/debian:12-slim
mkdir -p "$work/tmp"
export TMPDIR=$work/tmp
buildah() { command buildah --root "$work/root" --runroot "$work/run" --storage-driver vfs "$@"; }

# Where this machine gets packages from, and whom it trusts for that, the build may too.
make_base() {
  local root=$work/debootstrap container mirror
  mirror=$(awk '/^URIs:/ {print $2; exit} /^deb /{for (i = 2; i <= NF; i++) if ($i ~ /^http/) {print $i; exit}}' \
    /etc/apt/sources.list.d/debian.sources /etc/apt/sources.list 2>/dev/null)
  echo "==> debootstrap bookworm from $mirror"
  rm -rf "$root"
  debootstrap --variant=minbase --include=ca-certificates bookworm "$root" "$mirror" >"$work/debootstrap.log"
  cp -L /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/"
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

# inspect IMAGE TEMPLATE: a value of the image's configuration.
inspect() { buildah inspect --type image --format "$2" "$1"; }

check() {
  if "${@:2}"; then echo "ok: $1"; else echo "FAILED: $1" >&2; exit 1; fi
}

has_no_compiler() {
  local found
  found=$(find "$1"/usr/bin "$1"/usr/local/bin \( -name 'gcc*' -o -name 'g++*' -o -name 'cc' -o -name 'c++*' -o -name 'ld*' \
    -o -name 'as' -o -name 'cmake*' -o -name 'ninja' -o -name 'nvcc' -o -name 'clang*' \) ! -name 'ldd' -print)
  [[ -z $found ]] || { echo "$found" >&2; return 1; }
}

has_no_headers() { [[ ! -d $1/usr/include || -z $(find "$1/usr/include" -type f -print -quit) ]]; }

# In namespaces of its own: mounts ROOT read-only with CONFIG as /etc/headstart, starts the image's entry point as USER, and
# does what a kubelet does.
run_as_pod() {
  local root=$1 config=$2 user=$3 pid status=0
  ip link set lo up
  mount --bind "$root" "$root"
  mount -t tmpfs tmpfs "$root/etc/headstart" 2>/dev/null || { mkdir "$root/etc/headstart"; mount -t tmpfs tmpfs "$root/etc/headstart"; }
  cp "$config" "$root/etc/headstart/server.toml"
  mount -t proc proc "$root/proc"
  for name in null zero urandom; do touch "$root/dev/$name"; mount --bind "/dev/$name" "$root/dev/$name"; done
  mount -o remount,bind,ro "$root"
  chroot "$root" setpriv --reuid="${user%%:*}" --regid="${user##*:}" --clear-groups --bounding-set=-all --inh-caps=-all \
    --no-new-privs "${@:4}" &
  pid=$!
  timeout 120 bash -c 'until curl -sf http://127.0.0.1:9090/readyz >/dev/null; do sleep 0.2; done' || status=1
  curl -sf http://127.0.0.1:9090/healthz >/dev/null || status=1
  curl -sf http://127.0.0.1:9090/metrics | grep '^headstart_build_info' || status=1
  kill -TERM "$pid"
  wait "$pid" || status=$?
  return "$status"
}

starts_and_drains() {
  local root=$1 config=$2
  shift 2
  unshare --mount --net --fork --kill-child bash -c "$(declare -f run_as_pod); run_as_pod \"\$@\"" run_as_pod "$root" "$config" "$@"
}

build() {
  local target=$1
  echo "==> building headstart:$target"
  buildah bud --isolation chroot --layers --target "$target" --build-arg "CPU_BASE=$base" --tag "headstart:$target" \
    --file "$repo/deploy/Dockerfile" "$repo" </dev/null
}

test_image() {
  local target=$1 image=localhost/headstart:$1 container root user
  user=$(inspect "$image" '{{.OCIv1.Config.User}}')
  container=$(buildah from --pull-never "$image")
  root=$(buildah mount "$container")
  echo "==> testing $image: $(du -sh --apparent-size "$root" | cut -f1)"
  check "runs as 65532, not root" test "$user" = 65532:65532
  check "has no compiler" has_no_compiler "$root"
  check "has no headers" has_no_headers "$root"
  check "every library is there" chroot "$root" sh -c '! ldd /usr/local/bin/headstart | grep "not found"'
  check "shows its help" chroot --userspec="$user" "$root" /usr/local/bin/headstart --help >/dev/null
  if [[ $target == cpu-demo ]]; then
    check "starts as the overlay's pod, passes its probes, drains" starts_and_drains "$root" \
      "$repo/deploy/kubernetes/overlays/cpu-demo/server.toml" "$user" \
      /usr/local/bin/headstart serve --config=/etc/headstart/server.toml
  fi
  buildah umount "$container" >/dev/null
  buildah rm "$container" >/dev/null
}

buildah images -q "$base" >/dev/null 2>&1 || make_base
for target in "$@"; do
  build "$target"
  test_image "$target"
done
