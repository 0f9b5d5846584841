// One prompt on its way through the engine: what is asked, and what came of it.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "engine/attention_options.h"
#include "engine/run/sampling.h"
#include "kernels/attention_params.h"

namespace headstart {

struct PrefillJob {
  std::string request_id;
  std::vector<int32_t> token_ids;
  AttentionPreset preset =
      AttentionPreset::kBalanced;  // what `attention` started from, for provenance
  ProxyAttnOptions attention;
  SamplingOptions sampling;
  absl::Time deadline = absl::InfiniteFuture();
  // Set by whoever gives up on the job; read between layers.
  std::atomic<bool> cancelled{false};
};

struct PrefillResult {
  SampledToken first_token;
  std::vector<float> layer_density;  // executed / causal blocks
  // By layer. The last one attends only for the rows that the first token needs.
  std::vector<int64_t> layer_executed_blocks;
  std::vector<int64_t> layer_causal_blocks;
  // What the heads' budgets ask for, before the dense tail and dense fallbacks; what ran where no
  // budget was estimated.
  std::vector<int64_t> layer_predicted_blocks;
  int64_t executed_blocks = 0;
  int64_t causal_blocks = 0;
  int64_t dense_fallbacks = 0;
  double selection_seconds = 0;
  double attention_seconds = 0;
  double sink_seconds = 0;   // inside KvSink: waiting for the reader
  double total_seconds = 0;  // inside RunPrefill
};

}  // namespace headstart
