# shellcheck shell=bash
# Shell functions for a Python with vLLM on the CPU and our packages. Sourced behind deploy/lib.sh, by ./run.sh and tests/vllm/run.sh.

example_dir=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# ensure_vllm: prints the path of a Python in the cache that holds ./requirements.txt; made once, and again when that or Python
# changes. 1 GB to download, 2.8 GB on disk.
ensure_vllm() {
  local venv=$HEADSTART_CACHE/venvs/vllm wanted libraries
  install_apt_packages libnuma1 binutils gcc python3 python3-venv
  mkdir -p "$HEADSTART_CACHE/venvs"
  exec 7>"$venv.lock"
  flock 7
  wanted=$(python3 --version; cat "$example_dir/requirements.txt" "$example_dir/make_cuda_stubs.py" | sha256sum)
  if [[ ! -x $venv/bin/python || $(cat "$venv/.made_from" 2>/dev/null) != "$wanted" ]]; then
    say "Making the Python environment $venv (1 GB to download)"
    rm -rf "$venv"
    python3 -m venv "$venv"
    pip_install "$venv/bin/python" --no-deps -r "$example_dir/requirements.txt"
    libraries=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch/lib
    "$venv/bin/python" "$example_dir/make_cuda_stubs.py" "$libraries"
    printf '%s\n' "$wanted" >"$venv/.made_from"
  fi
  printf '%s\n' "$venv/bin/python"
}

# build_with_connector PYTHON BUILD_DIR FOLDER: builds headstart and the client's wheel with its native receiver there, and installs the
# wheel and the connector into a folder for PYTHONPATH.
build_with_connector() {
  local python=$1 build=$2 folder=$3 log
  local options=(-G Ninja -DCMAKE_BUILD_TYPE=Release -DHEADSTART_BUILD_TESTS=OFF "-DHEADSTART_TEST_PYTHON=$python")
  say "Building (CMake, Ninja): a few minutes the first time"
  log=$(cmake -S "$example_dir/../../.." -B "$build" "${options[@]}" 2>&1) || die "cmake failed" "$log"
  cmake --build "$build" --target headstart headstart_wheel >&2 || die "headstart could not be built"
  rm -rf "$folder" "$folder.source"
  cp -r "$example_dir/../../../client/python/vllm" "$folder.source"  # pip builds in the source's folder
  pip_install "$python" --no-deps --no-build-isolation --target "$folder" "$build"/wheel/*.whl "$folder.source"
}
