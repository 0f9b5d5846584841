// ProxyAttn's block selection (arXiv 2509.24745) on the CPU: steps 1 to 3, threaded, on the inner
// loops of simd/selection_kernels.h. reference_selection.h states what it computes.
#pragma once

#include <cstdint>
#include <memory>

#include "absl/status/status.h"
#include "kernels/attention_params.h"
#include "kernels/backend.h"

namespace headstart {

namespace simd {
struct KernelTable;
}

// Keeps its working memory between calls: nothing is allocated once it has run at its largest
// shape.
class ProxyAttnSelector {
 public:
  // kernels: of `dtype`, the type of q and of the KV pages; outlives the selector.
  ProxyAttnSelector(const simd::KernelTable& kernels, DType dtype, int32_t num_threads);
  ~ProxyAttnSelector();

  // Chooses the key blocks of args.q's query blocks. args: host memory; args.options must be valid
  // for the shape. Overwrites `selection`, reusing its memory; raises args.budget_ratio.
  // Sampled keys are recomputed from the pages, so earlier chunks and cached prefixes need nothing
  // else. What is dense by rule (dense_below_tokens, dense_layers) comes back with all counts m
  // + 1. The result does not depend on the number of threads, bit for bit. INVALID_ARGUMENT names
  // the argument that is out of range.
  absl::Status Select(const SelectArgs& args, BlockSelection& selection);

 private:
  struct Scratch;

  const simd::KernelTable& kernels_;
  DType dtype_;
  int32_t num_threads_;
  std::unique_ptr<Scratch> scratch_;
};

}  // namespace headstart
