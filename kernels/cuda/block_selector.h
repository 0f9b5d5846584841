// ProxyAttn's block selection (arXiv 2509.24745) on the device: scores, budgets, lists. Nothing
// goes through the host.
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/attention_params.h"
#include "kernels/cuda/cuda_resources.h"
#include "kernels/cuda/launchers.h"
#include "kernels/op_args.h"

namespace headstart::cuda {

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
  float2* mass_partials = nullptr;  // [num_heads][key blocks][kBlockTokens]
  float* mass_log_sums = nullptr;   // [num_heads][kBlockTokens]
  float* mass = nullptr;            // [num_heads][key blocks]
};

class BlockSelector {
 public:
  explicit BlockSelector(int num_sms) : num_sms_(num_sms) {}

  // Device memory that selections come to need for sequences of up to num_tokens tokens in pieces
  // of up to piece_tokens, whatever the options; and takes it.
  static int64_t PlanScratch(const HeadShape& heads, int64_t piece_tokens, int64_t num_tokens);
  absl::Status Reserve(int64_t bytes);

  // Enqueues the selection for one sequence of a call that passed CheckAttention. counts: in device
  // memory, gets what is kept added; or null.
  absl::Status Select(const SequenceAttention& args, BlockCounts* counts, uint32_t* tile_counter,
                      cudaStream_t stream);

  // What the last Select kept, on the device; until the next one, and on its stream.
  KeptBlocks kept() const { return {memory_.lists, memory_.counts, memory_.head_stride}; }
  // The same on the host, ranked; waits for the stream. args: of the last Select.
  absl::StatusOr<BlockSelection> Read(const SequenceAttention& args, cudaStream_t stream) const;

 private:
  // Sets params.q and params.k.
  absl::Status Pool(const SequenceAttention& args, ProxyScoreParams& params, cudaStream_t stream);
  // Scores and budgets.
  absl::Status Score(const SequenceAttention& args, uint32_t* tile_counter, cudaStream_t stream);
  absl::Status RowBudgets(const ProxyAttnOptions& options, const ProxyScoreParams& scores,
                          cudaStream_t stream);
  absl::Status HeadBudgets(const SequenceAttention& args, cudaStream_t stream);
  absl::Status FixedBudget(int64_t blocks, cudaStream_t stream);

  const int num_sms_;
  DeviceScratch scratch_;
  SelectionMemory memory_;  // in scratch_
  SelectionShape shape_{};
};

}  // namespace headstart::cuda
