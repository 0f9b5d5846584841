// Draws the first token from the last row of logits.
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"

namespace headstart {

struct SamplingOptions {
  float temperature = 0.0f;  // 0: greedy; at most 100
  int32_t top_k = 0;         // 0: all
  float top_p = 0.0f;        // 0: all
  uint64_t seed = 0;
};

struct SampledToken {
  int32_t id = 0;
  float logprob = 0.0f;  // natural, at temperature 1, over the whole vocabulary
};

// INVALID_ARGUMENT names the field.
absl::Status ValidateSamplingOptions(const SamplingOptions& options);

// Ties of the greedy choice go to the lower id. NonFiniteError when a logit is not finite.
absl::StatusOr<SampledToken> SampleToken(absl::Span<const float> logits,
                                         const SamplingOptions& options);

}  // namespace headstart
