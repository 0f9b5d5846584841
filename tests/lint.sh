#!/usr/bin/env bash
# Checks the C++ and CUDA sources: clang-format over all of them, clang-tidy (.clang-tidy) over the code that ships.
# tests/README.md says which checks run over what. Prints what it finds; fails when that is anything.
# usage: tests/lint.sh [FILE…]     FILE: a .cc file for clang-tidy, with all checks, instead of all of them
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=../deploy/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/../deploy/lib.sh"
cd "$repo_dir"

# Other versions format and find other things.
format=clang-format-14
export tidy=clang-tidy-14 build=build/lint checks

check_format() {
  find client engine kernels server tests -name '*.cc' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \
    | xargs "$format" --dry-run -Werror
}

# Leaves compile_commands.json and the generated headers in $build.
prepare() {
  mkdir -p build
  { cmake --preset cpu -B "$build" && cmake --build "$build" --target headstart_generated; } >"$build.log" 2>&1 || { cat "$build.log" >&2; die "cmake failed"; }
}

# check_tidy CHECKS FILE…: .clang-tidy with CHECKS added, as many files at a time as there are cores.
check_tidy() {
  checks=$1
  shift
  printf '%s\n' "$@" | xargs -P "$(nproc)" -I{} bash -c '
    log=$("$tidy" -p "$build" --quiet --checks="$checks" "{}" 2>&1) || { printf "%s\n" "$log"; exit 1; }'
}

main() {
  local failed=() all light
  say "Checking the format"
  check_format || failed+=(clang-format)
  say "Running clang-tidy"
  prepare
  if [[ $# -gt 0 ]]; then
    check_tidy '' "$@" || failed+=(clang-tidy)
  else
    # The analyzer follows calls into gRPC, protobuf, CLI11 and Beast, which takes longer than all other checks.
    mapfile -t all < <(find engine kernels server -name '*.cc' -not -path 'kernels/cuda/*' -not -path 'server/rpc/*' -not -path 'server/program/*' -not -name http_server.cc)
    mapfile -t light < <(find client server/rpc server/program server/net/http_server.cc -name '*.cc')
    check_tidy '' "${all[@]}" || failed+=(clang-tidy)
    check_tidy '-clang-analyzer-*' "${light[@]}" || failed+=(clang-tidy)
  fi
  [[ ${#failed[@]} -eq 0 ]] || die "found by ${failed[*]}: see above"
}

main "$@"
