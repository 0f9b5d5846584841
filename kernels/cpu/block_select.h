// From scores and masses to a BlockSelection: the rules of ProxyAttn's steps 2 and 3 that are no
// arithmetic on tokens. reference_selection.h states what the paper leaves open.
#pragma once

#include <cstdint>

#include "absl/types/span.h"
#include "kernels/attention_params.h"

namespace headstart {

// Sizes `selection`, budget_ratio too, for the query blocks of tokens [first_position, num_tokens);
// keeps its memory.
void ResetSelection(const HeadShape& shape, int32_t num_proxies, int64_t first_position,
                    int64_t num_tokens, BlockSelection& selection);

inline int32_t* MutableRanking(BlockSelection& selection, int32_t proxy, int64_t m) {
  return const_cast<int32_t*>(selection.Ranking(proxy, m));
}

// ranking = the blocks 0 .. m: the diagonal, the sink, local ones nearest first, then the rest by
// falling score, ties to the lower index. scores, keys (working memory), ranking: m + 1 entries.
void RankBlocks(const ProxyAttnOptions& options, int64_t m, const float* scores, uint64_t* keys,
                int32_t* ranking);

// order = the blocks 0 .. num_blocks - 1 by falling mass, ties to the lower index. mass, keys
// (working memory), order: num_blocks entries.
void OrderByMass(int64_t num_blocks, const float* mass, uint64_t* keys, int32_t* order);

// Least number of blocks, taken in `order`, whose masses (of a sum of 1) reach gamma; all of them
// when none does or gamma is 1.
int32_t BlocksToReach(float gamma, const float* mass, absl::Span<const int32_t> order);

// Budget of a head whose last row wants `wanted` of num_blocks key blocks: raises `ratio` (what
// earlier pieces wanted) and applies the floor.
int64_t HeadBudget(const ProxyAttnOptions& options, int32_t wanted, int64_t num_blocks,
                   float& ratio);
// counts[head][row m] = min(m + 1, budget).
void SetHeadCounts(int32_t head, int64_t budget, BlockSelection& selection);
// Counts of all heads with options.forced_density: the least budget that keeps as much.
void SetForcedCounts(const ProxyAttnOptions& options, BlockSelection& selection);
// Counts of the proxy's heads in row m, which wants `wanted` blocks: at least the floor.
void SetRowCounts(const ProxyAttnOptions& options, int32_t proxy, int64_t m, int64_t wanted,
                  BlockSelection& selection);
// All blocks for the rows from `first_row` (of the sequence) on.
void MakeDenseFrom(int64_t first_row, BlockSelection& selection);
// The dense tail, and all rows dense (dense_fallback) when more than dense_above_density is kept.
void ApplyDenseRules(const ProxyAttnOptions& options, bool ends_prompt, BlockSelection& selection);

}  // namespace headstart
