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

// Where the pieces of a selection lie in one stretch of device memory, 256-byte aligned.
struct SelectionMemory {
  SelectionMemory() = default;
  // For a chunk of num_tokens tokens. base: of `bytes` bytes, or null to learn how many.
  SelectionMemory(const HeadShape& heads, int64_t num_tokens, int64_t first_position,
                  const ProxyAttnOptions& options, void* base);

  int64_t bytes = 0;
  SelectionTotals* totals = nullptr;
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
  float2* mass_partials = nullptr;  // [num_heads][key blocks][kBlockTokens]
  float* mass_log_sums = nullptr;   // [num_heads][kBlockTokens]
  float* mass = nullptr;            // [num_heads][key blocks]
};

class BlockSelector {
 public:
  explicit BlockSelector(int num_sms) : num_sms_(num_sms) {}

  // Device memory that selections come to need for sequences of up to num_tokens tokens in chunks
  // of up to chunk_tokens, whatever the options; and takes it.
  static int64_t PlanScratch(const HeadShape& heads, int64_t chunk_tokens, int64_t num_tokens);
  absl::Status Reserve(int64_t bytes);

  // Enqueues the selection for one chunk of one layer. The arguments were checked
  // (kernels/select_args.h).
  absl::Status Select(const SelectArgs& args, uint32_t* tile_counter, cudaStream_t stream);

  // What the last Select kept, on the device; only on the stream of Select.
  KeptBlocks kept() const { return {memory_.lists, memory_.counts, memory_.head_stride}; }
  const SelectionTotals* totals() const { return memory_.totals; }
  // Whether the last Select was for this chunk.
  bool Matches(const HeadShape& heads, int64_t first_position, int64_t num_tokens) const;

  // The same on the host, ranked; waits for the stream.
  absl::StatusOr<BlockSelection> Read(cudaStream_t stream) const;

 private:
  // Sets params.q and params.k.
  absl::Status Pool(const SelectArgs& args, ProxyScoreParams& params, cudaStream_t stream);
  // Scores and budgets.
  absl::Status Score(const SelectArgs& args, uint32_t* tile_counter, cudaStream_t stream);
  absl::Status RowBudgets(const ProxyAttnOptions& options, const ProxyScoreParams& scores,
                          cudaStream_t stream);
  absl::Status HeadBudgets(const SelectArgs& args, cudaStream_t stream);
  absl::Status FixedBudget(int64_t blocks, cudaStream_t stream);

  const int num_sms_;
  DeviceScratch scratch_;
  SelectionMemory memory_;  // in scratch_
  SelectionShape shape_{};
  bool dense_by_rule_ = false;
  const float* budget_ratio_ = nullptr;
};

}  // namespace headstart::cuda
