// What a GPU would take and need, whether there is one or not.
#pragma once

#include "kernels/backend.h"
#include "kernels/cuda/selection_memory.h"
#include "kernels/op_args.h"

namespace headstart::cuda {

class CudaPlan : public BackendPlan {
 public:
  DType compute_dtype() const override { return kLimits.compute_dtype; }
  absl::Status CheckModel(const ModelShape& model) const override {
    return CheckShape(kLimits, model);
  }
  int64_t max_tokens() const override { return kLimits.max_tokens; }
  int64_t PlanScratchBytes(const HeadShape& heads, int64_t piece_tokens,
                           int64_t num_tokens) const override {
    return PlanScratch(heads, piece_tokens, num_tokens);
  }
};

}  // namespace headstart::cuda
