// Parameters of attention and of its block selection, and the layout of the KV cache.
//
// Dimension words, used everywhere: num_tokens, num_heads (query heads, H), num_kv_heads (H_kv),
// head_dim (d), block (kBlockTokens consecutive tokens: queries, keys and KV pages alike), proxy
// (representative head).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "kernels/base/dtype.h"

namespace headstart {

// Tokens of a block: of queries, of keys, and of a KV page.
inline constexpr int64_t kBlockTokens = 128;

constexpr int64_t NumBlocks(int64_t num_tokens) {
  return (num_tokens + kBlockTokens - 1) / kBlockTokens;
}

struct HeadShape {
  int32_t num_heads = 0;
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;

  constexpr int32_t group_size() const {
    return num_heads / num_kv_heads;
  }  // query heads that read one KV head
  constexpr int64_t qkv_cols() const { return int64_t{num_heads + 2 * num_kv_heads} * head_dim; }
};

// One layer's KV pages, of all sequences. A page is [K, V][num_kv_heads][kBlockTokens][head_dim] of
// `dtype`, contiguous: kBlockTokens tokens of one sequence. Memory belongs to the backend.
struct KvPages {
  void* pages = nullptr;
  DType dtype = DType::kBF16;
  HeadShape shape;

  constexpr int64_t plane_elements() const {
    return int64_t{shape.num_kv_heads} * kBlockTokens * shape.head_dim;
  }
  constexpr int64_t page_elements() const { return 2 * plane_elements(); }
};

// A page in fp8: scales, float32 [K, V][num_kv_heads], then OCP E4M3 numbers [K, V][num_kv_heads]
// [kBlockTokens][head_dim]. An element stands for the scale of its plane and head times its number.
constexpr int64_t Fp8ScaleBytes(const HeadShape& shape) {
  return int64_t{2} * shape.num_kv_heads * static_cast<int64_t>(sizeof(float));
}
constexpr int64_t Fp8PageBytes(const HeadShape& shape) {
  return Fp8ScaleBytes(shape) + int64_t{2} * shape.num_kv_heads * kBlockTokens * shape.head_dim;
}

enum class BudgetRule : uint8_t { kOwn, kShared, kRow };

// ProxyAttn (arXiv 2509.24745), every value resolved. `enabled == false` is dense attention.
struct ProxyAttnOptions {
  bool enabled = false;
  int32_t num_proxies = 1;  // g: divides num_heads, and divides num_kv_heads or is a multiple of it
  int32_t stride = 4;       // s: 4, 8 or 16
  BudgetRule budget = BudgetRule::kShared;
  float gamma = 0.95f;            // mass that a head's budget must reach, (0, 1]
  int32_t floor_tokens = 2048;    // least budget of a head
  int32_t sink_blocks = 1;        // forced: block 0 (0 or 1)
  int32_t local_blocks = 1;       // forced: blocks right before the diagonal one
  int32_t dense_tail_blocks = 2;  // last query blocks of the prompt that see everything
  int32_t dense_below_tokens = 4096;
  // More kept blocks than this share of the causal ones: run dense, it is faster.
  float dense_above_density = 0.6f;
  // Benchmarks only: > 0 replaces every head's budget by this share of the causal blocks.
  float forced_density = 0.0f;
  std::vector<int32_t> dense_layers;  // these layers always run dense; who calls attention obeys it

  friend bool operator==(const ProxyAttnOptions&, const ProxyAttnOptions&) = default;
};

// Budget of a head in blocks, floor included, from its budget ratio; of num_blocks key blocks.
inline int64_t BudgetBlocks(float ratio, int64_t num_blocks, int32_t floor_tokens) {
  // Less a little: the float ratio may lie above the one it stands for.
  const double budget = std::ceil(double{ratio} * static_cast<double>(num_blocks) - 0x1p-10);
  return std::max(static_cast<int64_t>(budget), NumBlocks(floor_tokens));
}

// A sequence's rows in the matrices of an operation: row first_row + i is its token first_position
// + i. The sequences of one call come in the order of their rows, which do not overlap; rows of no
// sequence are left alone. What a sequence gets does not depend on the others in the call.
struct SequenceRows {
  int64_t first_row = 0;
  int64_t num_rows = 0;
  int64_t first_position = 0;
  // Backend memory: token t lives in page page_table[t / kBlockTokens].
  const int32_t* page_table = nullptr;
};

// Pairs of a query block and a key block, summed over heads. Lies in backend memory; operations add
// and never clear.
struct BlockCounts {
  uint64_t executed_blocks = 0;
  uint64_t causal_blocks = 0;
  uint64_t dense_fallbacks = 0;  // selections that passed dense_above_density
};

// Kept key blocks of the query blocks [first_row, first_row + num_rows) of a sequence, on the host.
// Row m of proxy p has one ranking of its causal blocks 0..m: forced blocks first (the diagonal,
// then sink, then local ones nearest first), the rest by falling score, ties to the lower index.
// Head h keeps the first counts[h][m - first_row] of the ranking of its proxy p = h / (num_heads /
// num_proxies).
struct BlockSelection {
  int32_t num_heads = 0;
  int32_t num_proxies = 0;
  int64_t first_row = 0;
  int64_t num_rows = 0;
  std::vector<int32_t> ranking;  // proxy-major, then rows; row m has m + 1 entries
  std::vector<int32_t> counts;   // [num_heads][num_rows], 1 <= count <= m + 1
  std::vector<float>
      budget_ratio;  // [num_heads], budget / key blocks, before the floor (rules own and shared)
  bool dense_fallback = false;  // dense_above_density was passed: all counts are m + 1

  // Entries before row m of a proxy's rankings, counted from first_row.
  int64_t RankingOffset(int64_t m) const { return (m * (m + 1) - first_row * (first_row + 1)) / 2; }
  int64_t RankingStride() const { return RankingOffset(first_row + num_rows); }
  const int32_t* Ranking(int32_t proxy, int64_t m) const {
    return ranking.data() + proxy * RankingStride() + RankingOffset(m);
  }
  int32_t Count(int32_t head, int64_t m) const { return counts[head * num_rows + m - first_row]; }
};

}  // namespace headstart
