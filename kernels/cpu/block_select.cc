#include "kernels/cpu/block_select.h"

#include <algorithm>
#include <bit>
#include <numeric>

#include "kernels/op_args.h"

namespace headstart {
namespace {

// An integer that falls as the score rises; the same for 0 and -0.
uint32_t FallingKey(float score) {
  const uint32_t bits = std::bit_cast<uint32_t>(score + 0.0f);
  const uint32_t rising = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return ~rising;
}

// What blocks are sorted by: rank, then index.
uint64_t SortKey(uint32_t rank, int64_t block) {
  return uint64_t{rank} << 32 | static_cast<uint64_t>(block);
}

void SortBlocks(int64_t num_blocks, uint64_t* keys, int32_t* order) {
  std::sort(keys, keys + num_blocks);
  for (int64_t i = 0; i < num_blocks; ++i) order[i] = static_cast<int32_t>(keys[i] & 0xffffffffu);
}

}  // namespace

void ResetSelection(const HeadShape& shape, int32_t num_proxies, int64_t first_position,
                    int64_t num_tokens, BlockSelection& selection) {
  selection.num_heads = shape.num_heads;
  selection.num_proxies = num_proxies;
  selection.first_row = first_position / kBlockTokens;
  selection.num_rows = NumBlocks(num_tokens) - selection.first_row;
  selection.ranking.resize(num_proxies * selection.RankingStride());
  selection.counts.resize(selection.num_heads * selection.num_rows);
  selection.budget_ratio.resize(selection.num_heads);
  selection.dense_fallback = false;
}

void RankBlocks(const ProxyAttnOptions& options, int64_t m, const float* scores, uint64_t* keys,
                int32_t* ranking) {
  for (int64_t n = 0; n <= m; ++n) keys[n] = SortKey(FallingKey(scores[n]), n);
  // Forced blocks take the ranks 0, 1, …, before every score. A block that is forced twice keeps
  // the rank that is written last, the better one.
  for (int64_t i = std::min<int64_t>(options.local_blocks, m); i > 0; --i) {
    keys[m - i] = SortKey(static_cast<uint32_t>(1 + i), m - i);
  }
  if (options.sink_blocks > 0) keys[0] = SortKey(1, 0);
  keys[m] = SortKey(0, m);
  SortBlocks(m + 1, keys, ranking);
}

void OrderByMass(int64_t num_blocks, const float* mass, uint64_t* keys, int32_t* order) {
  for (int64_t n = 0; n < num_blocks; ++n) keys[n] = SortKey(FallingKey(mass[n]), n);
  SortBlocks(num_blocks, keys, order);
}

int32_t BlocksToReach(float gamma, const float* mass, absl::Span<const int32_t> order) {
  const auto all = static_cast<int32_t>(order.size());
  if (gamma >= 1.0f) return all;
  double sum = 0;
  for (int32_t i = 0; i < all; ++i) {
    sum += mass[order[i]];
    if (sum >= gamma) return i + 1;
  }
  return all;
}

int64_t HeadBudget(const ProxyAttnOptions& options, int32_t wanted, int64_t num_blocks,
                   float& ratio) {
  ratio = std::max(ratio, static_cast<float>(wanted) / static_cast<float>(num_blocks));
  return BudgetBlocks(ratio, num_blocks, options.floor_tokens);
}

void SetHeadCounts(int32_t head, int64_t budget, BlockSelection& selection) {
  int32_t* counts = selection.counts.data() + head * selection.num_rows;
  for (int64_t i = 0; i < selection.num_rows; ++i) {
    counts[i] = static_cast<int32_t>(std::min(selection.first_row + i + 1, budget));
  }
}

void SetForcedCounts(const ProxyAttnOptions& options, BlockSelection& selection) {
  const int64_t end = selection.first_row + selection.num_rows;
  const int64_t budget = BudgetForDensity(selection.first_row, end, options.forced_density);
  for (int32_t head = 0; head < selection.num_heads; ++head) {
    SetHeadCounts(head, budget, selection);
  }
}

void SetRowCounts(const ProxyAttnOptions& options, int32_t proxy, int64_t m, int64_t wanted,
                  BlockSelection& selection) {
  const int64_t heads = selection.num_heads / selection.num_proxies;
  const int64_t count = std::min(m + 1, std::max(wanted, NumBlocks(options.floor_tokens)));
  for (int64_t h = proxy * heads; h < (proxy + 1) * heads; ++h) {
    selection.counts[h * selection.num_rows + m - selection.first_row] =
        static_cast<int32_t>(count);
  }
}

void MakeDenseFrom(int64_t first_row, BlockSelection& selection) {
  const int64_t begin = std::max<int64_t>(first_row - selection.first_row, 0);
  for (int64_t head = 0; head < selection.num_heads; ++head) {
    int32_t* counts = selection.counts.data() + head * selection.num_rows;
    for (int64_t i = begin; i < selection.num_rows; ++i) {
      counts[i] = static_cast<int32_t>(selection.first_row + i + 1);
    }
  }
}

void ApplyDenseRules(const ProxyAttnOptions& options, bool ends_prompt, BlockSelection& selection) {
  if (ends_prompt) {
    MakeDenseFrom(selection.first_row + selection.num_rows - options.dense_tail_blocks, selection);
  }
  const auto& counts = selection.counts;
  const int64_t kept = std::accumulate(counts.begin(), counts.end(), int64_t{0});
  const int64_t causal = selection.num_heads * selection.RankingStride();
  selection.dense_fallback =
      static_cast<double>(kept) > double{options.dense_above_density} * static_cast<double>(causal);
  if (selection.dense_fallback) MakeDenseFrom(0, selection);
}

}  // namespace headstart
