// Attention as someone asks for it, at server start or in a request: a preset, and single values in
// place of the preset's.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/attention_options.h"
#include "kernels/attention_params.h"

namespace headstart {

// A value that is absent is the preset's.
struct AttentionRequest {
  std::optional<AttentionPreset> preset;
  std::optional<int32_t> num_proxies;
  std::optional<int32_t> stride;
  std::optional<BudgetRule> budget;
  std::optional<float> gamma;
  std::optional<int32_t> floor_tokens;
  std::optional<int32_t> sink_blocks;
  std::optional<int32_t> local_blocks;
  std::optional<int32_t> dense_tail_blocks;
  std::optional<int32_t> dense_below_tokens;

  // Something besides the preset is set.
  bool HasOverrides() const;
};

// What a server runs when a request says nothing, and what a request can't change.
struct AttentionDefaults {
  AttentionRequest request;
  std::optional<float> dense_above_density;
  std::vector<int32_t> dense_layers;
};

struct ResolvedAttention {
  AttentionPreset preset = AttentionPreset::kBalanced;  // what it started from
  ProxyAttnOptions options;
};

// A request without a preset starts from the server's own choice, one with a preset from that.
// INVALID_ARGUMENT (names the field): values beside the preset EXACT, which has none. Whether the
// values suit the model is ValidateAttentionOptions' question.
absl::StatusOr<ResolvedAttention> ResolveAttention(const AttentionRequest& request,
                                                   const AttentionDefaults& defaults,
                                                   const HeadShape& heads);

}  // namespace headstart
