// ProxyAttn's block selection (arXiv 2509.24745) on the device: scores, budgets, lists. Nothing
// goes through the host.
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/attention_params.h"
#include "kernels/cuda/cuda_resources.h"
#include "kernels/cuda/launchers.h"
#include "kernels/cuda/selection_memory.h"
#include "kernels/op_args.h"

namespace headstart::cuda {

class BlockSelector {
 public:
  explicit BlockSelector(int num_sms) : num_sms_(num_sms) {}

  // Takes device memory, see PlanSelection.
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
