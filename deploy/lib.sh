# shellcheck shell=bash
# Shell functions shared by the scripts of deploy/ and tests/. Sourced by bash scripts that run with `set -euo pipefail`.
# Everything that is installed by pip, downloaded or converted lies below HEADSTART_CACHE, outside the repository.

HEADSTART_CACHE=${HEADSTART_CACHE:-$HOME/.cache/headstart}
deploy_dir=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck disable=SC2034  # for the scripts
repo_dir=$(dirname "$deploy_dir")

if [[ -t 2 && -z ${NO_COLOR:-} ]]; then bold=$'\e[1m' plain=$'\e[0m'; else bold='' plain=''; fi

# Messages go to stderr: the stdout of a function is its result.
say() { printf '%s==>%s %s\n' "$bold" "$plain" "$*" >&2; }
note() { printf '    %s\n' "$@" >&2; }
die() {
  printf '%serror:%s %s\n' "$bold" "$plain" "$1" >&2
  shift
  [[ $# -eq 0 ]] || note "$@"
  exit 1
}

# as_root COMMAND…: runs it as root, through sudo where needed.
as_root() {
  if [[ $(id -u) -eq 0 ]]; then
    env DEBIAN_FRONTEND=noninteractive "$@"
  elif command -v sudo >/dev/null; then
    sudo env DEBIAN_FRONTEND=noninteractive "$@"
  else
    die "'$*' must run as root, and there is no sudo" "Run this script as root, or install sudo."
  fi
}

# missing_apt_packages PACKAGE…: prints those that are not installed.
missing_apt_packages() {
  local package
  for package in "$@"; do
    [[ $(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null) == installed ]] || printf '%s\n' "$package"
  done
}

# install_apt_packages PACKAGE…: installs those that are missing, without recommended packages and without starting
# services. Asks for nothing when all are there.
install_apt_packages() {
  local missing
  mapfile -t missing < <(missing_apt_packages "$@")
  [[ ${#missing[@]} -gt 0 ]] || return 0
  say "Installing Debian packages: ${missing[*]}"
  local advice="Install them by hand (apt-get install --no-install-recommends ${missing[*]}), then run this again."
  as_root apt-get -qq update || die "apt-get update failed" "$advice"
  without_services apt-get -y -qq -o Dpkg::Use-Pty=0 -o APT::Status-Fd=3 install --no-install-recommends \
    "${missing[@]}" 3> >(show_apt_progress) >/dev/null || die "apt-get could not install the packages" "$advice"
  note "done"
}

# without_services COMMAND…: as_root COMMAND, with a policy that keeps packages from starting their services.
without_services() {
  local policy=/usr/sbin/policy-rc.d made=0 status=0
  if [[ ! -e $policy ]]; then
    printf '#!/bin/sh\nexit 101\n' | as_root tee "$policy" >/dev/null
    as_root chmod 755 "$policy"
    made=1
  fi
  as_root "$@" || status=$?
  [[ $made -eq 0 ]] || as_root rm -f "$policy"
  return "$status"
}

# Reads the machine-readable status of apt on stdin and prints a line for every tenth of the work.
show_apt_progress() {
  local kind package percent message shown=-1
  while IFS=: read -r kind package percent message; do
    percent=${percent%%.*}
    [[ $kind =~ ^(dlstatus|pmstatus)$ && $percent =~ ^[0-9]+$ ]] || continue
    (( percent / 10 != shown )) || continue
    shown=$((percent / 10))
    note "$percent % ${message}"
  done
}

# ensure_venv NAME REQUIREMENTS_FILE: a virtual environment in the cache that holds exactly these requirements; made
# once, and again when the file or Python changes. Prints the path of its Python.
ensure_venv() {
  local venv=$HEADSTART_CACHE/venvs/$1 requirements=$2 wanted
  python3 -c 'import ensurepip, venv' 2>/dev/null || install_apt_packages python3 python3-venv
  mkdir -p "$HEADSTART_CACHE/venvs"
  exec 8>"$venv.lock"
  flock 8
  wanted=$(python3 --version; sha256sum <"$requirements")
  if [[ ! -x $venv/bin/python || $(cat "$venv/.made_from" 2>/dev/null) != "$wanted" ]]; then
    say "Making the Python environment $venv"
    rm -rf "$venv"
    python3 -m venv "$venv"
    pip_install "$venv/bin/python" -r "$requirements"
    printf '%s\n' "$wanted" >"$venv/.made_from"
  fi
  printf '%s\n' "$venv/bin/python"
}

# pip_install PYTHON ARGUMENT…
pip_install() {
  local python=$1
  shift
  "$python" -m pip install --disable-pip-version-check --no-input --progress-bar off "$@" \
    | sed -nu '/metadata/d; s/^ *\(Downloading [^ ]* ([^)]*)\).*/    \1/p; s/^\(Installing\) .*/    \1 …/p' >&2 \
    || die "pip could not install: $*" \
      "Without PyPI: put the wheels into a folder and set PIP_NO_INDEX=1 PIP_FIND_LINKS=FOLDER."
}
