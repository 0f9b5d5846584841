// ProxyAttn's block selection (arXiv 2509.24745) on the CPU: steps 1 to 3, threaded, on the inner
// loops of simd/selection_kernels.h. reference_selection.h states what it computes.
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "kernels/attention_params.h"
#include "kernels/cpu/memory.h"
#include "kernels/cpu/simd/kernel_table.h"
#include "kernels/op_args.h"

namespace headstart {

// Keeps its working memory between calls; used by one thread at a time. Nothing is allocated once
// it has run at its largest shape.
class ProxyAttnSelector {
 public:
  // kernels: of `dtype`, the type of q and of the KV pages; outlives the selector.
  ProxyAttnSelector(const simd::KernelTable& kernels, DType dtype, int32_t num_threads)
      : kernels_(kernels), dtype_(dtype), num_threads_(num_threads) {}

  // Chooses the key blocks of args.q's query blocks; args passed CheckAttention. Overwrites
  // `selection`, reusing its memory; raises args.budget_ratio. Sampled keys are recomputed from the
  // pages, so earlier pieces and cached prefixes need nothing else. What is dense by rule comes
  // back with all counts m + 1. The result does not depend on the number of threads, bit for bit.
  // RESOURCE_EXHAUSTED when working memory is short.
  absl::Status Select(const SequenceAttention& args, BlockSelection& selection);

  // Working memory, selection included, once sequences of `num_tokens` tokens have run in pieces of
  // `piece_tokens`, with the options that need most.
  int64_t PlanScratchBytes(const HeadShape& shape, int64_t piece_tokens, int64_t num_tokens) const;

 private:
  const simd::KernelTable& kernels_;
  const DType dtype_;
  const int32_t num_threads_;
  Scratch scratch_;
};

}  // namespace headstart
