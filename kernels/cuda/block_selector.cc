#include "kernels/cuda/block_selector.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"

namespace headstart::cuda {
namespace {

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

SelectionShape MakeShape(const SequenceAttention& args) {
  const ProxyAttnOptions& options = *args.proxy_attn;
  SelectionShape shape{};
  shape.num_heads = args.kv.shape.num_heads;
  shape.num_proxies = options.num_proxies;
  shape.first_row = args.first_position / kBlockTokens;
  shape.num_rows = NumBlocks(args.num_tokens()) - shape.first_row;
  shape.score_stride = shape.num_key_blocks();
  shape.sink_blocks = options.sink_blocks;
  shape.local_blocks = options.local_blocks;
  shape.dense_tail_rows = args.ends_prompt ? options.dense_tail_blocks : 0;
  return shape;
}

absl::Status Copy(const void* device, int64_t bytes, void* host, cudaStream_t stream) {
  HEADSTART_RETURN_IF_ERROR(
      ToStatus(cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, stream),
               "reading the selection"));
  return ToStatus(cudaStreamSynchronize(stream), "reading the selection");
}

// Blocks 0..m: forced ones first, then by falling score, ties to the lower index (see RankKey).
void RankRow(int64_t m, const SelectionShape& shape, const float* scores, int32_t* ranking) {
  const auto forced_place = [&](int32_t n) -> int64_t {
    if (n == m) return 0;
    if (n < shape.sink_blocks) return 1;
    if (m - n <= shape.local_blocks) return 1 + (m - n);
    return int64_t{2} + shape.local_blocks;
  };
  std::iota(ranking, ranking + m + 1, 0);
  std::stable_sort(ranking, ranking + m + 1, [&](int32_t a, int32_t b) {
    const int64_t place_a = forced_place(a), place_b = forced_place(b);
    if (place_a != place_b) return place_a < place_b;
    return place_a == int64_t{2} + shape.local_blocks && scores[a] > scores[b];
  });
}

}  // namespace

absl::Status BlockSelector::Reserve(int64_t bytes) { return scratch_.Reserve(bytes).status(); }

absl::Status BlockSelector::Pool(const SequenceAttention& args, ProxyScoreParams& params,
                                 cudaStream_t stream) {
  const HeadShape& heads = args.kv.shape;
  params.k = memory_.pooled_keys;
  HEADSTART_RETURN_IF_ERROR(
      ToStatus(LaunchPoolKeys({args.kv, args.page_table, args.num_tokens(), params.num_key_heads,
                               params.stride, memory_.pooled_keys},
                              stream),
               "pooling keys"));
  if (params.num_proxies == heads.num_heads) {  // nothing to average: read in place
    params.q = args.q.data;
    params.q_head_stride = heads.head_dim;
    params.q_row_stride = params.stride * args.q.row_stride;
    return absl::OkStatus();
  }
  params.q = memory_.pooled_queries;
  params.q_head_stride = params.num_q * heads.head_dim;
  params.q_row_stride = heads.head_dim;
  return ToStatus(LaunchPoolQueries({args.q.data, args.q.rows, args.q.row_stride, heads,
                                     params.num_proxies, params.stride, memory_.pooled_queries},
                                    stream),
                  "pooling queries");
}

absl::Status BlockSelector::Score(const SequenceAttention& args, uint32_t* tile_counter,
                                  cudaStream_t stream) {
  const ProxyAttnOptions& options = *args.proxy_attn;
  ProxyScoreParams params{};
  params.num_q = CeilDiv(args.q.rows, options.stride);
  params.first_sample = args.first_position / options.stride;
  params.num_proxies = options.num_proxies;
  params.num_key_heads = std::min(options.num_proxies, args.kv.shape.num_kv_heads);
  params.head_dim = args.kv.shape.head_dim;
  params.stride = options.stride;
  params.row_maxima = memory_.row_maxima;
  params.row_sums = memory_.row_sums;
  params.scores = memory_.scores;
  params.score_stride = shape_.score_stride;
  params.log_sums = memory_.query_log_sums;
  params.tile_counter = tile_counter;
  params.num_sms = num_sms_;
  HEADSTART_RETURN_IF_ERROR(Pool(args, params, stream));
  HEADSTART_RETURN_IF_ERROR(ToStatus(LaunchProxyScore(params, stream), "proxy scores"));
  return BudgetsByRow(options) ? RowBudgets(options, params, stream) : HeadBudgets(args, stream);
}

absl::Status BlockSelector::RowBudgets(const ProxyAttnOptions& options,
                                       const ProxyScoreParams& scores, cudaStream_t stream) {
  HEADSTART_RETURN_IF_ERROR(
      ToStatus(LaunchRowMass({scores, memory_.row_mass}, stream), "row mass"));
  const RowBudgetParams params{
      shape_,           options.gamma,  static_cast<int32_t>(NumBlocks(options.floor_tokens)),
      memory_.row_mass, memory_.scores, memory_.row_budgets};
  return ToStatus(LaunchRowBudget(params, stream), "row budgets");
}

absl::Status BlockSelector::HeadBudgets(const SequenceAttention& args, cudaStream_t stream) {
  const ProxyAttnOptions& options = *args.proxy_attn;
  if (options.forced_density > 0) {
    return FixedBudget(
        BudgetForDensity(shape_.first_row, shape_.num_key_blocks(), options.forced_density),
        stream);
  }
  HEADSTART_RETURN_IF_ERROR(ToStatus(
      LaunchBlockMass({args.q.data, args.q.rows, args.q.row_stride, args.first_position, args.kv,
                       args.page_table, static_cast<float2*>(memory_.mass_partials),
                       memory_.mass_log_sums, memory_.mass, num_sms_},
                      stream),
      "block mass"));
  const HeadBudgetParams params{shape_,
                                options.budget == BudgetRule::kShared,
                                options.gamma,
                                static_cast<int32_t>(NumBlocks(options.floor_tokens)),
                                memory_.mass,
                                memory_.scores,
                                args.budget_ratio,
                                memory_.budget_blocks};
  return ToStatus(LaunchHeadBudget(params, stream), "head budgets");
}

absl::Status BlockSelector::FixedBudget(int64_t blocks, cudaStream_t stream) {
  return ToStatus(LaunchFixedBudget(shape_.num_heads, static_cast<int32_t>(blocks),
                                    memory_.budget_blocks, stream),
                  "fixed budgets");
}

absl::Status BlockSelector::Select(const SequenceAttention& args, BlockCounts* counts,
                                   uint32_t* tile_counter, cudaStream_t stream) {
  const ProxyAttnOptions& options = *args.proxy_attn;
  const auto lay_out = [&](void* base) {
    return SelectionMemory(args.kv.shape, args.q.rows, args.first_position, options, base);
  };
  HEADSTART_ASSIGN_OR_RETURN(void* const base, scratch_.Reserve(lay_out(nullptr).bytes));
  memory_ = lay_out(base);
  shape_ = MakeShape(args);
  const bool dense_by_rule = IsDenseByRule(options, args.num_tokens());
  HEADSTART_RETURN_IF_ERROR(dense_by_rule ? FixedBudget(shape_.num_key_blocks(), stream)
                                          : Score(args, tile_counter, stream));
  const BlockSelectParams params{shape_,
                                 memory_.budget_blocks,
                                 dense_by_rule ? nullptr : memory_.row_budgets,
                                 memory_.scores,
                                 dense_by_rule ? 1.0f : options.dense_above_density,
                                 memory_.totals,
                                 counts,
                                 memory_.lists,
                                 memory_.counts,
                                 memory_.head_stride};
  return ToStatus(LaunchBlockSelect(params, stream), "block lists");
}

absl::StatusOr<BlockSelection> BlockSelector::Read(const SequenceAttention& args,
                                                   cudaStream_t stream) const {
  const bool dense_by_rule = IsDenseByRule(*args.proxy_attn, args.num_tokens());
  BlockSelection selection;
  selection.num_heads = shape_.num_heads;
  selection.num_proxies = shape_.num_proxies;
  selection.first_row = shape_.first_row;
  selection.num_rows = shape_.num_rows;
  selection.counts.resize(shape_.num_heads * shape_.num_rows);
  HEADSTART_RETURN_IF_ERROR(Copy(memory_.counts, selection.counts.size() * sizeof(int32_t),
                                 selection.counts.data(), stream));
  selection.budget_ratio.resize(shape_.num_heads);
  HEADSTART_RETURN_IF_ERROR(Copy(args.budget_ratio, selection.budget_ratio.size() * sizeof(float),
                                 selection.budget_ratio.data(), stream));
  BlockCounts totals;
  HEADSTART_RETURN_IF_ERROR(Copy(memory_.totals, sizeof(totals), &totals, stream));
  selection.dense_fallback = totals.dense_fallbacks != 0;
  selection.ranking.resize(shape_.num_proxies * selection.RankingStride());
  for (int32_t p = 0; p < shape_.num_proxies; ++p) {
    for (int64_t row = 0; row < shape_.num_rows; ++row) {
      const int64_t m = shape_.first_row + row;
      // Without scores (dense by rule) all are equal: the ranking is by index.
      std::vector<float> scores(m + 1);
      if (!dense_by_rule) {
        const float* from = memory_.scores + (p * shape_.num_rows + row) * shape_.score_stride;
        HEADSTART_RETURN_IF_ERROR(Copy(from, (m + 1) * sizeof(float), scores.data(), stream));
      }
      RankRow(
          m, shape_, scores.data(),
          selection.ranking.data() + p * selection.RankingStride() + selection.RankingOffset(m));
    }
  }
  return selection;
}

}  // namespace headstart::cuda
