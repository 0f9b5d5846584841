#include "kernels/cuda/selection_memory.h"

#include <algorithm>

namespace headstart::cuda {
namespace {

constexpr int64_t kBf16Bytes = 2;
constexpr int64_t kHalfBytes = 2;
constexpr int64_t kPairBytes = 8;  // float2

int64_t RoundedUp(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t Triangle(int64_t rows) { return rows * (rows + 1) / 2; }

}  // namespace

ProxyScoreScratch PlanProxyScore(int64_t num_q, int64_t first_sample, int32_t num_proxies,
                                 int32_t stride) {
  const int64_t key_tiles = RoundedUp(first_sample + num_q, kKeyTile);
  const int64_t ranges = RoundedUp(key_tiles, kRangeTiles);
  return {num_proxies * num_q * key_tiles * stride * kHalfBytes,
          num_proxies * num_q * ranges * kPairBytes};
}

bool BudgetsByRow(const ProxyAttnOptions& options) {
  return options.budget == BudgetRule::kRow && options.forced_density == 0;
}

SelectionMemory::SelectionMemory(const HeadShape& heads, int64_t num_tokens, int64_t first_position,
                                 const ProxyAttnOptions& options, void* base) {
  const auto begin = reinterpret_cast<uintptr_t>(base);
  const auto take = [&](int64_t count, int64_t size) {
    void* const at = reinterpret_cast<void*>(begin + bytes);
    bytes += (count * size + 255) / 256 * 256;
    return at;
  };
  const int64_t d = heads.head_dim, g = options.num_proxies;
  const int64_t end = first_position + num_tokens, first_row = first_position / kBlockTokens;
  const int64_t blocks = NumBlocks(end), rows = blocks - first_row;
  const int64_t num_q = RoundedUp(num_tokens, options.stride);
  const int64_t num_keys = first_position / options.stride + num_q;
  totals = static_cast<BlockCounts*>(take(1, sizeof(BlockCounts)));
  budget_blocks = static_cast<int32_t*>(take(heads.num_heads, sizeof(int32_t)));
  head_stride = Triangle(blocks) - Triangle(first_row);
  lists = static_cast<uint16_t*>(take(heads.num_heads * head_stride, sizeof(uint16_t)));
  counts = static_cast<int32_t*>(take(heads.num_heads * rows, sizeof(int32_t)));
  // Without an average the queries are read in place.
  pooled_queries = take(g == heads.num_heads ? 0 : g * num_q * d, kBf16Bytes);
  pooled_keys = take(std::min<int64_t>(g, heads.num_kv_heads) * num_keys * d, kBf16Bytes);
  const ProxyScoreScratch score_scratch =
      PlanProxyScore(num_q, first_position / options.stride, options.num_proxies, options.stride);
  row_maxima = take(score_scratch.maxima_bytes, 1);
  row_sums = take(score_scratch.sums_bytes, 1);
  scores = static_cast<float*>(take(g * rows * blocks, sizeof(float)));
  if (BudgetsByRow(options)) {
    query_log_sums = static_cast<float*>(take(g * num_q, sizeof(float)));
    row_mass = static_cast<float*>(take(g * rows * blocks, sizeof(float)));
    row_budgets = static_cast<int32_t*>(take(g * rows, sizeof(int32_t)));
  } else {
    mass_partials = take(heads.num_heads * blocks * kBlockTokens, kPairBytes);
    mass_log_sums = static_cast<float*>(take(heads.num_heads * kBlockTokens, sizeof(float)));
    mass = static_cast<float*>(take(heads.num_heads * blocks, sizeof(float)));
  }
}

int64_t PlanSelection(const HeadShape& heads, int64_t piece_tokens, int64_t num_tokens) {
  // The last piece of the longest sequence.
  const int64_t rows = NumBlocks(std::min(piece_tokens, num_tokens)) * kBlockTokens;
  const int64_t first_position = NumBlocks(num_tokens) * kBlockTokens - rows;
  int64_t most = 0;
  ProxyAttnOptions options;
  options.stride = 4;
  for (const BudgetRule rule : {BudgetRule::kShared, BudgetRule::kRow}) {
    options.budget = rule;
    // Proxies that are averages need memory for their queries, one a head needs none.
    for (const int32_t g : {heads.num_heads, heads.num_heads / 2}) {
      options.num_proxies = std::max(g, 1);
      most = std::max(most, SelectionMemory(heads, rows, first_position, options, nullptr).bytes);
    }
  }
  return most;
}

int64_t PlanScratch(const HeadShape& heads, int64_t piece_tokens, int64_t num_tokens) {
  return PlanSelection(heads, piece_tokens, num_tokens) + piece_tokens * int64_t{sizeof(int32_t)};
}

}  // namespace headstart::cuda
