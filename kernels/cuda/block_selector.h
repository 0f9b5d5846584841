// ProxyAttn's block selection (arXiv 2509.24745) on the device: scores, budgets, lists. Nothing
// goes through the host.
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/attention_params.h"
#include "kernels/backend.h"
#include "kernels/cuda/cuda_resources.h"
#include "kernels/cuda/launchers.h"

namespace headstart::cuda {

class BlockSelector {
 public:
  explicit BlockSelector(int num_sms) : num_sms_(num_sms) {}

  // Enqueues the selection for one chunk of one layer.
  absl::Status Select(const SelectArgs& args, uint32_t* tile_counter, cudaStream_t stream);

  // What the last Select kept, on the device; only on the stream of Select.
  const KeptBlocks& kept() const { return kept_; }
  const SelectionTotals* totals() const { return totals_; }
  // Whether the last Select was for this chunk.
  bool Matches(const HeadShape& heads, int64_t first_position, int64_t num_tokens) const;

  // The same on the host, ranked; waits for the stream.
  absl::StatusOr<BlockSelection> Read(cudaStream_t stream) const;

 private:
  // Sets params.q and params.k.
  absl::Status Pool(const SelectArgs& args, ProxyScoreParams& params, cudaStream_t stream);
  // Scores; under the budget rule `row` also the budgets.
  absl::Status Score(const SelectArgs& args, uint32_t* tile_counter, cudaStream_t stream);
  absl::Status RowBudgets(const ProxyAttnOptions& options, const RowMassParams& mass,
                          cudaStream_t stream);
  absl::Status HeadBudgets(const SelectArgs& args, cudaStream_t stream);
  int64_t ScoreBytes() const;

  const int num_sms_;
  DeviceScratch pooled_queries_, pooled_keys_, maxima_, sums_, scores_memory_, partial_, small_,
      lists_, counts_memory_, row_log_sums_, row_mass_, row_budgets_memory_;

  SelectionShape shape_{};
  bool dense_by_rule_ = false;
  const float* budget_ratio_ = nullptr;
  KeptBlocks kept_;
  float* scores_ = nullptr;           // [num_proxies][num_rows][score_stride]
  float* mass_ = nullptr;             // [num_heads][key blocks]
  float* log_sums_ = nullptr;         // [num_heads][kBlockTokens]
  int32_t* budget_blocks_ = nullptr;  // [num_heads]
  int32_t* row_budgets_ = nullptr;    // [num_proxies][num_rows]; null: budgets by head
  SelectionTotals* totals_ = nullptr;
};

}  // namespace headstart::cuda
