#include "engine/memory_plan.h"

#include <algorithm>

#include "engine/run/decoder.h"
#include "engine/run/request_slot.h"

namespace headstart {
namespace {

// One layer's linear weights and biases, in elements.
int64_t LinearElements(const ModelConfig& c) {
  const int64_t hidden = c.hidden_size;
  const int64_t ffn = c.intermediate_size;
  const int64_t q_size = int64_t{c.heads.num_heads} * c.heads.head_dim;
  return c.heads.qkv_cols() * hidden + q_size * hidden + 3 * ffn * hidden;
}

// One layer's vectors, kept in f32: norms and biases.
int64_t VectorElements(const ModelConfig& c) {
  int64_t elements = int64_t{2} * c.hidden_size;
  if (c.qk_norm) elements += int64_t{2} * c.heads.head_dim;
  if (c.qkv_bias) elements += c.heads.qkv_cols();
  if (c.o_bias) elements += c.hidden_size;
  if (c.mlp_bias) elements += int64_t{2} * c.intermediate_size + c.hidden_size;
  return elements;
}

// What becomes one weight is read at once.
int64_t LargestRead(const ModelConfig& c) {
  const int64_t rows =
      std::max({int64_t{c.vocab_size}, int64_t{2} * c.intermediate_size, c.heads.qkv_cols()});
  return rows * c.hidden_size;
}

}  // namespace

MemoryPlan PlanMemory(const ModelConfig& config, DType compute_dtype, const StepLimits& limits,
                      int64_t kv_pool_tokens) {
  const int64_t pool_tokens = NumBlocks(kv_pool_tokens) * kBlockTokens;
  const int64_t f32 = DTypeBytes(DType::kF32);
  const int64_t vocabulary = int64_t{config.vocab_size} * config.hidden_size;
  MemoryPlan plan;
  // The embedding and the output projection are kept apart even when they are tied: one is looked
  // up, the other multiplied.
  plan.weight_bytes =
      (config.num_layers * LinearElements(config) + 2 * vocabulary) * DTypeBytes(compute_dtype) +
      (config.num_layers * VectorElements(config) + config.hidden_size) * f32;
  plan.reading_bytes = LargestRead(config) * DTypeBytes(config.dtype);
  plan.kv_bytes_per_token = config.KvBytesPerToken(compute_dtype);
  plan.kv_pool_bytes = pool_tokens * plan.kv_bytes_per_token;
  const int64_t positions = std::min(config.max_positions, pool_tokens);
  const int64_t rope_bytes = positions * config.heads.head_dim * f32;  // cosines and sines
  plan.workspace_bytes =
      rope_bytes + limits.num_slots * RequestSlot::Bytes(config, pool_tokens / kBlockTokens);
  for (const int64_t rows : {limits.max_rows, limits.urgent_rows}) {
    if (rows == 0) continue;
    plan.workspace_bytes += ActivationBytes(config, compute_dtype, /*residual_dtype=*/DType::kF32,
                                            std::min(rows, pool_tokens), limits.max_pieces);
  }
  return plan;
}

}  // namespace headstart
