#include "kernels/cpu/selection_run.h"

#include "absl/types/span.h"
#include "kernels/cpu/block_select.h"
#include "kernels/cpu/parallel.h"

namespace headstart {

void SelectionRun::PackSampledKeys() const {
  const int64_t pages = c_.sample_pages();
  ParallelFor(num_threads_, c_.key_groups * pages, [&](int64_t i, int32_t thread) {
    PackSamplePage(static_cast<int32_t>(i / pages), i % pages, MemoryOf(thread));
  });
}

void SelectionRun::PackSamplePage(int32_t group, int64_t page,
                                  const SelectionThreadMemory& memory) const {
  const int64_t head_dim = c_.shape.head_dim;
  const int32_t heads = c_.shape.num_kv_heads / c_.key_groups;
  const int64_t first = page * kBlockTokens;
  const int64_t count = std::min(kBlockTokens, c_.num_samples - first);
  for (int64_t i = 0; i < count; ++i) {
    kernels_.selection.pool(c_.Key((first + i) * c_.options.stride, int64_t{group} * heads), heads,
                            kBlockTokens * head_dim, head_dim,
                            memory.rows + i * head_dim * DTypeBytes(c_.args.kv.dtype));
  }
  kernels_.attention.pack_k(
      memory.rows, count, head_dim,
      shared_.sampled_keys + (group * c_.sample_pages() + page) * shared_.page_bytes);
}

void SelectionRun::RankRows(bool scored, BlockSelection& selection) const {
  const int32_t g = c_.options.num_proxies;
  // The last rows have most blocks: first, so that the threads end together.
  ParallelFor(num_threads_, selection.num_rows * g, [&](int64_t i, int32_t thread) {
    const auto proxy = static_cast<int32_t>(i % g);
    const int64_t m = c_.num_blocks - 1 - i / g;
    const SelectionThreadMemory memory = MemoryOf(thread);
    if (scored) {
      ScoreRow(proxy, m, memory);
    } else {
      std::fill_n(memory.log_max, m + 1, 0.0f);
    }
    int32_t* ranking = MutableRanking(selection, proxy, m);
    RankBlocks(c_.options, m, memory.log_max, memory.sort_keys, ranking);
    if (c_.options.budget == BudgetRule::kRow && scored) {
      const int32_t wanted =
          BlocksToReach(c_.options.gamma, memory.mass, absl::MakeConstSpan(ranking, m + 1));
      SetRowCounts(c_.options, proxy, m, wanted, selection);
    }
  });
}

void SelectionRun::ScoreRow(int32_t proxy, int64_t m, const SelectionThreadMemory& memory) const {
  const int64_t head_dim = c_.shape.head_dim;
  const int32_t heads = c_.shape.num_heads / c_.options.num_proxies;
  const int32_t group = proxy / (c_.options.num_proxies / c_.key_groups);
  const int64_t first = m * c_.samples_per_block;
  const int64_t count = std::min(c_.samples_per_block, c_.num_samples - first);
  for (int64_t i = 0; i < count; ++i) {
    kernels_.selection.pool(c_.Query((first + i) * c_.options.stride, int64_t{proxy} * heads),
                            heads, head_dim, head_dim,
                            memory.rows + i * head_dim * DTypeBytes(c_.args.q.dtype));
  }
  kernels_.selection.pack_q(memory.rows, head_dim, count, head_dim, memory.packed_q);
  const char* keys = shared_.sampled_keys + group * c_.sample_pages() * shared_.page_bytes;
  for (int64_t page = 0; page * kBlockTokens < first + count; ++page) {
    const int64_t first_block = page * c_.options.stride;  // a page of samples has `stride` blocks
    kernels_.selection.block_stats({.packed_q = memory.packed_q,
                                    .num_rows = count,
                                    .head_dim = head_dim,
                                    .packed_k = keys + page * shared_.page_bytes,
                                    .first_visible = first - page * kBlockTokens,
                                    .block_keys = c_.samples_per_block,
                                    .max = memory.max + first_block,
                                    .sum = memory.sum + first_block,
                                    .stride = c_.stats_stride});
  }
  kernels_.selection.reduce_rows({.max = memory.max,
                                  .sum = memory.sum,
                                  .stride = c_.stats_stride,
                                  .num_rows = count,
                                  .num_blocks = m + 1,
                                  .log_max = memory.log_max,
                                  .mass = memory.mass});
}

void SelectionRun::ScoreLastBlock() const {
  const int64_t first_token = (c_.num_blocks - 1) * kBlockTokens;
  ParallelFor(num_threads_, c_.shape.num_heads, [&](int64_t head, int32_t) {
    kernels_.selection.pack_q(c_.Query(first_token, head), c_.args.q.row_stride, c_.last_block_rows,
                              c_.shape.head_dim, shared_.queries + head * shared_.query_floats);
  });
  const int64_t units = c_.num_blocks * c_.shape.num_kv_heads;
  ParallelFor(num_threads_, units, [&](int64_t i, int32_t thread) {
    const auto kv_head = static_cast<int32_t>(i % c_.shape.num_kv_heads);
    ScorePageForGroup(kv_head, i / c_.shape.num_kv_heads, MemoryOf(thread));
  });
}

void SelectionRun::ScorePageForGroup(int32_t kv_head, int64_t page,
                                     const SelectionThreadMemory& memory) const {
  const int64_t first_token = page * kBlockTokens;
  kernels_.attention.pack_k(c_.Key(first_token, kv_head),
                            std::min(kBlockTokens, c_.num_tokens - first_token), c_.shape.head_dim,
                            memory.packed_page);
  const int64_t heads = c_.shape.group_size();
  for (int64_t head = kv_head * heads; head < (kv_head + 1) * heads; ++head) {
    const int64_t stats = head * c_.last_block_rows * c_.stats_stride + page;
    kernels_.selection.block_stats({.packed_q = shared_.queries + head * shared_.query_floats,
                                    .num_rows = c_.last_block_rows,
                                    .head_dim = c_.shape.head_dim,
                                    .packed_k = memory.packed_page,
                                    .first_visible = (c_.num_blocks - 1 - page) * kBlockTokens,
                                    .block_keys = kBlockTokens,
                                    .max = shared_.max + stats,
                                    .sum = shared_.sum + stats,
                                    .stride = c_.stats_stride});
  }
}

void SelectionRun::SetBudgets(BlockSelection& selection) const {
  const int32_t heads_per_proxy = c_.shape.num_heads / c_.options.num_proxies;
  ParallelFor(num_threads_, c_.shape.num_heads, [&](int64_t i, int32_t thread) {
    const auto head = static_cast<int32_t>(i);
    const SelectionThreadMemory memory = MemoryOf(thread);
    const int64_t stats = head * c_.last_block_rows * c_.stats_stride;
    kernels_.selection.reduce_rows({.max = shared_.max + stats,
                                    .sum = shared_.sum + stats,
                                    .stride = c_.stats_stride,
                                    .num_rows = c_.last_block_rows,
                                    .num_blocks = c_.num_blocks,
                                    .log_max = memory.log_max,
                                    .mass = memory.mass});
    const int32_t* order = selection.Ranking(head / heads_per_proxy, c_.num_blocks - 1);
    if (c_.options.budget == BudgetRule::kOwn) {
      OrderByMass(c_.num_blocks, memory.mass, memory.sort_keys, memory.order);
      order = memory.order;
    }
    const int32_t wanted =
        BlocksToReach(c_.options.gamma, memory.mass, absl::MakeConstSpan(order, c_.num_blocks));
    const int64_t budget =
        HeadBudget(c_.options, wanted, c_.num_blocks, c_.args.budget_ratio[head]);
    SetHeadCounts(head, budget, selection);
  });
}

}  // namespace headstart
