#!/usr/bin/env bash
# Installs what the tests need, checks the sources (tests/lint.sh), builds, and runs every test that needs no GPU. Closes
# with ctest's summary.
# usage: tests/run.sh        as root or with sudo, from any folder
#
# torch, transformers and the model go into HEADSTART_CACHE (~/.cache/headstart), outside the repository, while the first
# builds run; builds go into build/. Four builds: the core without gRPC under ThreadSanitizer (tsan); the end-to-end tests
# under AddressSanitizer and UBSan (asan); the CUDA kernels, which fail to build when they spill registers (cuda);
# everything (cpu).
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=../deploy/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/../deploy/lib.sh"
cd "$repo_dir"

install_packages() {
  local packages
  mapfile -t packages <deploy/image/build_packages
  install_apt_packages "${packages[@]}" chromium-headless-shell clang-format-14 clang-tidy-14 libomp-14-dev libgtest-dev libgmock-dev openssl prometheus python3 python3-venv
}

# Makes the Python of the tests: tests/requirements.txt and the client package as it is now.
prepare_python() {
  local python
  python=$(ensure_venv tests "$repo_dir/tests/requirements.txt")
  say "Installing client/python"
  "$python" -m pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation --force-reinstall ./client/python \
    || die "client/python could not be built"
}

# Fills HEADSTART_CACHE: the Python of the tests, that of the tools, the model.
fill_cache() {
  prepare_python
  # In a subshell, as above: its lock goes with it.
  (ensure_venv tools "$repo_dir/deploy/requirements.txt") >/dev/null
  deploy/models/fetch_smollm2.sh
}

# Prints the CMake options for the CUDA toolkit that came with the Python packages.
cuda_options() {
  local python=$1 root name
  root=$("$python" -c 'import nvidia; print(nvidia.__path__[0])')/cu13
  # The packages lack the names that nvcc and the linker look for.
  ln -sfn lib "$root/lib64"
  for name in cublasLt cudart cupti; do ln -sf "lib$name.so.13" "$root/lib/lib$name.so"; done
  printf '%s\n' "-DCMAKE_CUDA_COMPILER=$root/bin/nvcc" "-DCUDAToolkit_ROOT=$root"
}

# build PRESET TARGET [CMAKE OPTION…]: with the files of a target in groups of eight, as the headers of gRPC, protobuf and
# GoogleTest cost more than the files.
build() {
  local preset=$1 target=$2
  shift 2
  say "Building $target ($preset)"
  if command -v ccache >/dev/null; then set -- "$@" -DCMAKE_CXX_COMPILER_LAUNCHER=ccache; fi
  mkdir -p build
  cmake --preset "$preset" -DCMAKE_UNITY_BUILD=ON "$@" >"build/$preset.log" 2>&1 || { cat "build/$preset.log" >&2; die "cmake failed"; }
  cmake --build "build/$preset" --target "$target"
}

# run_tests PRESET [CTEST OPTION…]: what fails is tried once more, as connections of gRPC 1.51 sometimes fail for nothing on
# a busy machine (tests/README.md); what that was is said.
run_tests() {
  local preset=$1 result=0 again
  shift
  say "Running tests ($preset)"
  ctest --test-dir "build/$preset" --output-on-failure --no-tests=error -j 2 --repeat until-pass:2 "$@" \
    | tee "build/$preset.tests.log" || result=1
  again=$(sed -n 's/.*Test *#[0-9]*: \([^ ]*\).*\*\*\*\(Failed\|Timeout\|Exception\).*/\1/p' "build/$preset.tests.log" | sort -u)
  [[ -z $again ]] || say "Did not pass at once: ${again//$'\n'/ }"
  return "$result"
}

main() {
  # Two tests at a time share the cores: OpenMP threads that wait must not spin.
  export OMP_WAIT_POLICY=passive
  install_packages
  local python cuda filling failed=()
  mkdir -p build
  fill_cache >build/cache.log 2>&1 &
  filling=$!
  tests/lint.sh || failed+=(lint)
  build tsan tests_tsan
  run_tests tsan -L tsan || failed+=(tsan)
  build asan tests_e2e
  run_tests asan -L e2e -LE python || failed+=(asan)
  say "Waiting for the Python packages and the model"
  wait "$filling" || { cat build/cache.log >&2; die "the cache could not be filled"; }
  python=$(ensure_venv tests "$repo_dir/tests/requirements.txt")
  mapfile -t cuda < <(cuda_options "$python")
  build cuda headstart_cuda_kernels "${cuda[@]}"
  build cpu all -DHEADSTART_TEST_PYTHON="$python"
  run_tests cpu || failed+=(cpu)
  [[ ${#failed[@]} -eq 0 ]] || die "failed: ${failed[*]}"
}

main "$@"
