// One prompt: what is asked, and what came of it.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "engine/attention_options.h"
#include "engine/run/sampling.h"
#include "engine/ship/kv_part.h"
#include "kernels/attention_params.h"

namespace headstart {

// KV that is kept after compute, to be fetched.
struct DetachedKv {
  absl::Duration lease = absl::ZeroDuration();  // zero: the engine's default
  // Parts that will be fetched: together everything, or none.
  std::vector<KvPart> readers;
  // Who may fetch, renew and release: the name in a client's certificate. Empty: whoever knows the
  // id.
  std::string owner;
};

struct PrefillRequest {
  std::string request_id;
  std::vector<int32_t> token_ids;
  AttentionPreset preset =
      AttentionPreset::kBalanced;  // what `attention` started from, for provenance
  ProxyAttnOptions attention;
  SamplingOptions sampling;
  absl::Time deadline = absl::InfiniteFuture();
  int64_t skip_tokens = 0;  // their KV is computed, not shipped
  std::optional<DetachedKv> detached;
  std::string manifest;  // handed to everyone who reads the KV; the engine does not look at it

  int64_t num_tokens() const { return static_cast<int64_t>(token_ids.size()); }
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
  double compute_seconds = 0;  // inside Runner::Run, the two above included
  // Between pieces, because the host memory was full of KV that nobody had taken.
  double room_wait_seconds = 0;
  absl::Time accepted_at = absl::InfinitePast();
  absl::Time started_at = absl::InfinitePast();   // compute began
  absl::Time computed_at = absl::InfinitePast();  // and ended
};

}  // namespace headstart
