#!/usr/bin/env bash
# A real, unmodified vLLM on the CPU decodes what Headstart prefilled (tests/vllm). Not a part of tests/run.sh: it downloads 1 GB the
# first time; vLLM's own text of 8000 tokens in float32 takes most of the rest (36 minutes beside ten builds on two cores).
# usage: tests/vllm/run.sh [PYTEST ARGUMENT…]
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=../../deploy/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../deploy/lib.sh"
# shellcheck source-path=SCRIPTDIR source=../../deploy/examples/vllm/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../deploy/examples/vllm/env.sh"
cd "$repo_dir"

main() {
  local python build=$repo_dir/build/quickstart
  mkdir -p build
  python=$(ensure_vllm)
  build_with_connector "$python" "$build" "$build/vllm_packages"
  deploy/models/fetch_smollm2.sh >/dev/null
  say "Running tests/vllm"
  HEADSTART_BIN_DIR=$build/bin PYTHONPATH=$repo_dir/tests/vllm:$build/vllm_packages \
    "$python" -m pytest -q -rPs -p no:cacheprovider --durations=0 "${@:-tests/vllm}"
}

main "$@"
