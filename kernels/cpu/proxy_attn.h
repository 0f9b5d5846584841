// ProxyAttn's block selection (arXiv 2509.24745) on the CPU: steps 1 to 3, threaded, SIMD chosen at
// run time.
#pragma once

#include <memory>

#include "absl/status/status.h"
#include "kernels/attention_params.h"
#include "kernels/backend.h"

namespace headstart {

// Keeps its working memory between calls: nothing is allocated once it has run at its largest
// shape.
class ProxyAttnSelector {
 public:
  ProxyAttnSelector();
  ~ProxyAttnSelector();

  // Chooses the key blocks of args.q's query blocks. args: host memory, q and kv of one dtype,
  // kBF16 or kF32; args.options must be valid for the shape. Overwrites `selection`, reusing its
  // memory; raises args.budget_ratio. Sampled keys are recomputed from the pages, so earlier chunks
  // and cached prefixes need nothing else. What is dense by rule (dense_below_tokens, dense_layers)
  // comes back with all counts m + 1. INVALID_ARGUMENT names the argument that is out of range.
  absl::Status Select(const SelectArgs& args, BlockSelection& selection);

 private:
  struct Scratch;
  std::unique_ptr<Scratch> scratch_;
};

}  // namespace headstart
