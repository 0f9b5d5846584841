// What a model needs of memory, from its config alone.
#pragma once

#include <cstdint>

#include "engine/model/model_config.h"

namespace headstart {

struct MemoryPlan {
  int64_t weight_bytes = 0;  // as the backend keeps them
  int64_t kv_bytes_per_token = 0;
  int64_t kv_pool_bytes = 0;
  // Activations of one step and of an urgent one inside it (residual stream in f32), what running
  // requests need beside their pages, RoPE table.
  int64_t workspace_bytes = 0;
  // Of attention and selection; the backend's to say (Backend::PlanScratchBytes).
  int64_t scratch_bytes = 0;
  // KV in fp8 on its way to the host; see KvStaging.
  int64_t staging_bytes = 0;
  // Of the host, not of the device: KV on its way out; and weights that are read, before the
  // backend has taken them.
  int64_t host_kv_bytes = 0;
  int64_t reading_bytes = 0;
  int64_t total_bytes() const {
    return weight_bytes + kv_pool_bytes + workspace_bytes + scratch_bytes + staging_bytes;
  }
};

// What runs at once, as in LocalRunnerOptions.
struct StepLimits {
  int64_t max_rows = 0;
  int64_t urgent_rows = 0;
  int64_t max_pieces = 1;
  int32_t num_slots = 1;
};

// All but scratch_bytes, staging_bytes and host_kv_bytes. A backend may pad its weights a little.
MemoryPlan PlanMemory(const ModelConfig& config, DType compute_dtype, const StepLimits& limits,
                      int64_t kv_pool_tokens);

}  // namespace headstart
