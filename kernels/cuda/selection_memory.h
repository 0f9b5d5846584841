// What the CUDA backend takes and needs, without CUDA: so that a plan can be made where there is
// none.
#pragma once

#include <cstdint>

#include "kernels/attention_params.h"
#include "kernels/op_args.h"

namespace headstart::cuda {

inline constexpr OpLimits kLimits = {.compute_dtype = DType::kBF16,
                                     .residual_dtype = DType::kBF16,
                                     .row_bytes = 16,
                                     .row_values = 8,
                                     .head_dim_step = 64,
                                     .max_head_dim = 128,
                                     .max_tokens = 14464 * kBlockTokens};  // of LaunchBlockSelect

// Tiles of sampled keys, and how many of them one range has that is reduced by itself.
inline constexpr int kKeyTile = 128;
inline constexpr int kRangeTiles = 32;

struct ProxyScoreScratch {
  int64_t maxima_bytes, sums_bytes;
};
ProxyScoreScratch PlanProxyScore(int64_t num_q, int64_t first_sample, int32_t num_proxies,
                                 int32_t stride);

// The rule `row`, where a budget is not given outright.
bool BudgetsByRow(const ProxyAttnOptions& options);

// Where the pieces of a selection lie in one stretch of device memory, 256-byte aligned.
struct SelectionMemory {
  SelectionMemory() = default;
  // For a piece of num_tokens tokens. base: of `bytes` bytes, or null to learn how many.
  SelectionMemory(const HeadShape& heads, int64_t num_tokens, int64_t first_position,
                  const ProxyAttnOptions& options, void* base);

  int64_t bytes = 0;
  BlockCounts* totals = nullptr;
  int32_t* budget_blocks = nullptr;  // [num_heads]
  uint16_t* lists = nullptr;         // see KeptBlocks
  int32_t* counts = nullptr;
  int64_t head_stride = 0;
  void* pooled_queries = nullptr;
  void* pooled_keys = nullptr;
  void* row_maxima = nullptr;  // see ProxyScoreScratch
  void* row_sums = nullptr;
  float* scores = nullptr;  // [num_proxies][num_rows][key blocks]
  // Budget rule `row` only.
  float* query_log_sums = nullptr;  // [num_proxies][sampled queries]
  float* row_mass = nullptr;        // as scores
  int32_t* row_budgets = nullptr;   // [num_proxies][num_rows]
  // The other rules only.
  void* mass_partials = nullptr;   // float2 [num_heads][key blocks][kBlockTokens]
  float* mass_log_sums = nullptr;  // [num_heads][kBlockTokens]
  float* mass = nullptr;           // [num_heads][key blocks]
};

// Device memory that selections come to need for sequences of up to num_tokens tokens in pieces of
// up to piece_tokens, whatever the options.
int64_t PlanSelection(const HeadShape& heads, int64_t piece_tokens, int64_t num_tokens);
// The same, and what else the operations keep.
int64_t PlanScratch(const HeadShape& heads, int64_t piece_tokens, int64_t num_tokens);

}  // namespace headstart::cuda
