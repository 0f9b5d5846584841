// A whole model made of kernels/cpu/reference_ops alone: what the engine's forward pass is held to.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "engine/model/model_config.h"
#include "kernels/cpu/reference_ops.h"

namespace headstart {

struct ReferenceResult {
  std::vector<reference::KvRows> layers;  // [num_tokens, H_kv d], K after RoPE
  std::vector<float> logits;              // of the last token
  std::vector<double> layer_density;      // executed / causal blocks
};

// Runs `token_ids` in one piece through the model in `model_dir`. Every operation is one of
// reference_ops; where a backend keeps activations, weights or KV in `dtype`, the results are
// rounded to it. The residual stream is fp32.
absl::StatusOr<ReferenceResult> RunReference(const std::string& model_dir,
                                             absl::Span<const int32_t> token_ids,
                                             const ProxyAttnOptions& options, DType dtype);

}  // namespace headstart
