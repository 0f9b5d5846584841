#include "kernels/cuda/block_selector.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"
#include "kernels/select_args.h"

namespace headstart::cuda {
namespace {

bool BudgetsByRow(const ProxyAttnOptions& options) {
  return options.budget == BudgetRule::kRow && options.forced_density == 0;
}

int64_t Triangle(int64_t rows) { return rows * (rows + 1) / 2; }

SelectionShape MakeShape(const SelectArgs& args) {
  const ProxyAttnOptions& options = *args.options;
  SelectionShape shape{};
  shape.num_heads = args.kv.shape.num_heads;
  shape.num_proxies = options.num_proxies;
  shape.first_row = args.first_position / kBlockTokens;
  shape.num_rows = NumBlocks(args.first_position + args.q.rows) - shape.first_row;
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

absl::Status BlockSelector::Pool(const SelectArgs& args, ProxyScoreParams& params,
                                 cudaStream_t stream) {
  const HeadShape& heads = args.kv.shape;
  const int64_t num_keys = params.first_sample + params.num_q;
  const int64_t k_bytes = params.num_key_heads * num_keys * heads.head_dim * 2;
  HEADSTART_ASSIGN_OR_RETURN(void* const k, pooled_keys_.Reserve(k_bytes));
  params.k = k;
  HEADSTART_RETURN_IF_ERROR(ToStatus(LaunchPoolKeys({args.kv, args.first_position + args.q.rows,
                                                     params.num_key_heads, params.stride, k},
                                                    stream),
                                     "pooling keys"));
  if (params.num_proxies == heads.num_heads) {  // nothing to average: read in place
    params.q = args.q.data;
    params.q_head_stride = heads.head_dim;
    params.q_row_stride = params.stride * args.q.row_stride;
    return absl::OkStatus();
  }
  params.q_head_stride = params.num_q * heads.head_dim;
  params.q_row_stride = heads.head_dim;
  HEADSTART_ASSIGN_OR_RETURN(
      void* const q, pooled_queries_.Reserve(params.num_proxies * params.q_head_stride * 2));
  params.q = q;
  return ToStatus(LaunchPoolQueries({args.q.data, args.q.rows, args.q.row_stride, heads,
                                     params.num_proxies, params.stride, q},
                                    stream),
                  "pooling queries");
}

absl::Status BlockSelector::Score(const SelectArgs& args, uint32_t* tile_counter,
                                  cudaStream_t stream) {
  const ProxyAttnOptions& options = *args.options;
  ProxyScoreParams params{};
  params.num_q = (args.q.rows + options.stride - 1) / options.stride;
  params.first_sample = args.first_position / options.stride;
  params.num_proxies = options.num_proxies;
  params.num_key_heads = std::min(options.num_proxies, args.kv.shape.num_kv_heads);
  params.head_dim = args.kv.shape.head_dim;
  params.stride = options.stride;
  HEADSTART_RETURN_IF_ERROR(Pool(args, params, stream));
  const ProxyScoreScratch plan =
      PlanProxyScore(params.num_q, params.first_sample, options.num_proxies, options.stride);
  HEADSTART_ASSIGN_OR_RETURN(params.row_maxima, maxima_.Reserve(plan.maxima_bytes));
  HEADSTART_ASSIGN_OR_RETURN(params.row_sums, sums_.Reserve(plan.sums_bytes));
  params.scores = scores_;
  params.score_stride = shape_.score_stride;
  params.tile_counter = tile_counter;
  params.num_sms = num_sms_;
  if (!BudgetsByRow(options)) {
    return ToStatus(LaunchProxyScore(params, stream), "proxy scores");
  }
  const int64_t log_sum_bytes = options.num_proxies * params.num_q * int64_t{sizeof(float)};
  HEADSTART_ASSIGN_OR_RETURN(void* const log_sums, row_log_sums_.Reserve(log_sum_bytes));
  params.log_sums = static_cast<float*>(log_sums);
  HEADSTART_RETURN_IF_ERROR(ToStatus(LaunchProxyScore(params, stream), "proxy scores"));
  HEADSTART_ASSIGN_OR_RETURN(void* const mass, row_mass_.Reserve(ScoreBytes()));
  return RowBudgets(options, {params, static_cast<float*>(mass)}, stream);
}

absl::Status BlockSelector::RowBudgets(const ProxyAttnOptions& options, const RowMassParams& mass,
                                       cudaStream_t stream) {
  HEADSTART_RETURN_IF_ERROR(ToStatus(LaunchRowMass(mass, stream), "row mass"));
  const int64_t bytes = shape_.num_proxies * shape_.num_rows * int64_t{sizeof(int32_t)};
  HEADSTART_ASSIGN_OR_RETURN(void* const budgets, row_budgets_memory_.Reserve(bytes));
  row_budgets_ = static_cast<int32_t*>(budgets);
  const RowBudgetParams params{
      shape_,    options.gamma, static_cast<int32_t>(NumBlocks(options.floor_tokens)),
      mass.mass, scores_,       row_budgets_};
  return ToStatus(LaunchRowBudget(params, stream), "row budgets");
}

int64_t BlockSelector::ScoreBytes() const {
  return shape_.num_proxies * shape_.num_rows * shape_.score_stride * int64_t{sizeof(float)};
}

absl::Status BlockSelector::HeadBudgets(const SelectArgs& args, cudaStream_t stream) {
  const ProxyAttnOptions& options = *args.options;
  if (dense_by_rule_ || options.forced_density > 0) {
    const int64_t blocks =
        dense_by_rule_
            ? shape_.num_key_blocks()
            : BudgetForDensity(shape_.first_row, shape_.num_key_blocks(), options.forced_density);
    return ToStatus(
        LaunchFixedBudget(shape_.num_heads, static_cast<int32_t>(blocks), budget_blocks_, stream),
        "fixed budgets");
  }
  const int64_t partials = shape_.num_heads * shape_.num_key_blocks() * kBlockTokens;
  HEADSTART_ASSIGN_OR_RETURN(void* const partial,
                             partial_.Reserve(partials * int64_t{sizeof(float2)}));
  HEADSTART_RETURN_IF_ERROR(
      ToStatus(LaunchBlockMass({args.q.data, args.q.rows, args.q.row_stride, args.first_position,
                                args.kv, static_cast<float2*>(partial), log_sums_, mass_, num_sms_},
                               stream),
               "block mass"));
  const HeadBudgetParams params{shape_,
                                options.budget == BudgetRule::kShared,
                                options.gamma,
                                static_cast<int32_t>(NumBlocks(options.floor_tokens)),
                                mass_,
                                scores_,
                                args.budget_ratio,
                                budget_blocks_};
  return ToStatus(LaunchHeadBudget(params, stream), "head budgets");
}

absl::Status BlockSelector::Select(const SelectArgs& args, uint32_t* tile_counter,
                                   cudaStream_t stream) {
  shape_ = MakeShape(args);
  dense_by_rule_ = IsDenseByRule(*args.options, args.first_position + args.q.rows, args.layer);
  budget_ratio_ = args.budget_ratio;
  const int64_t rows = shape_.num_rows, blocks = shape_.num_key_blocks();
  HEADSTART_ASSIGN_OR_RETURN(void* const scores, scores_memory_.Reserve(ScoreBytes()));
  scores_ = static_cast<float*>(scores);
  // Mass, log-sums and budgets of the heads, and the totals, 8-byte aligned in front.
  const int64_t head_floats = blocks + kBlockTokens + 1;
  HEADSTART_ASSIGN_OR_RETURN(void* const small,
                             small_.Reserve(int64_t{sizeof(SelectionTotals)} +
                                            shape_.num_heads * head_floats * int64_t{4}));
  totals_ = static_cast<SelectionTotals*>(small);
  mass_ = reinterpret_cast<float*>(totals_ + 1);
  log_sums_ = mass_ + shape_.num_heads * blocks;
  budget_blocks_ = reinterpret_cast<int32_t*>(log_sums_ + shape_.num_heads * kBlockTokens);
  const int64_t head_stride = Triangle(blocks) - Triangle(shape_.first_row);
  HEADSTART_ASSIGN_OR_RETURN(void* const lists, lists_.Reserve(shape_.num_heads * head_stride *
                                                               int64_t{sizeof(uint16_t)}));
  HEADSTART_ASSIGN_OR_RETURN(void* const counts, counts_memory_.Reserve(shape_.num_heads * rows *
                                                                        int64_t{sizeof(int32_t)}));
  kept_ = {static_cast<uint16_t*>(lists), static_cast<int32_t*>(counts), head_stride};

  row_budgets_ = nullptr;
  if (!dense_by_rule_) HEADSTART_RETURN_IF_ERROR(Score(args, tile_counter, stream));
  if (row_budgets_ == nullptr) HEADSTART_RETURN_IF_ERROR(HeadBudgets(args, stream));
  const BlockSelectParams params{shape_,
                                 budget_blocks_,
                                 row_budgets_,
                                 scores_,
                                 dense_by_rule_ ? 1.0f : args.options->dense_above_density,
                                 totals_,
                                 static_cast<uint16_t*>(lists),
                                 static_cast<int32_t*>(counts),
                                 head_stride};
  return ToStatus(LaunchBlockSelect(params, stream), "block lists");
}

bool BlockSelector::Matches(const HeadShape& heads, int64_t first_position,
                            int64_t num_tokens) const {
  return kept_.lists != nullptr && first_position == shape_.first_row * kBlockTokens &&
         NumBlocks(num_tokens) == shape_.num_rows && heads.num_heads == shape_.num_heads;
}

absl::StatusOr<BlockSelection> BlockSelector::Read(cudaStream_t stream) const {
  if (kept_.lists == nullptr)
    return absl::FailedPreconditionError("ReadSelection before SelectBlocks");
  BlockSelection selection;
  selection.num_heads = shape_.num_heads;
  selection.num_proxies = shape_.num_proxies;
  selection.first_row = shape_.first_row;
  selection.num_rows = shape_.num_rows;
  selection.counts.resize(shape_.num_heads * shape_.num_rows);
  HEADSTART_RETURN_IF_ERROR(Copy(kept_.counts, selection.counts.size() * sizeof(int32_t),
                                 selection.counts.data(), stream));
  selection.budget_ratio.resize(shape_.num_heads);
  HEADSTART_RETURN_IF_ERROR(Copy(budget_ratio_, selection.budget_ratio.size() * sizeof(float),
                                 selection.budget_ratio.data(), stream));
  SelectionTotals totals{};
  HEADSTART_RETURN_IF_ERROR(Copy(totals_, sizeof(totals), &totals, stream));
  selection.dense_fallback = totals.dense_fallback != 0;
  selection.ranking.resize(shape_.num_proxies * selection.RankingStride());
  for (int32_t p = 0; p < shape_.num_proxies; ++p) {
    for (int64_t row = 0; row < shape_.num_rows; ++row) {
      const int64_t m = shape_.first_row + row;
      // Without scores (dense by rule) all are equal: the ranking is by index.
      std::vector<float> scores(m + 1);
      if (!dense_by_rule_) {
        const float* from = scores_ + (p * shape_.num_rows + row) * shape_.score_stride;
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
