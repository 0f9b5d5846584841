// Matrix products on the CPU: oneDNN's matmul, weights in the form it likes best.
//
// Results are the same from run to run with the same number of threads; oneDNN promises no more
// than that. With 2.6.3, 1 and 2 threads gave the same bits on the shapes of SmolLM2.
#pragma once

#include <cstdint>
#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "kernels/cpu/isa.h"

namespace headstart {

// Used by one thread at a time, not always the same one.
class OneDnnGemm {
 public:
  // compute_dtype: kBF16 or kF32. `isa` is an upper bound for oneDNN too, for the whole process; it
  // has no effect where oneDNN has run before. INTERNAL when oneDNN can't start.
  static absl::StatusOr<std::unique_ptr<OneDnnGemm>> Create(CpuIsa isa, DType compute_dtype,
                                                            int32_t num_threads);
  ~OneDnnGemm();

  // Converts and reorders the row-concatenation of `parts`; see Backend::PrepareLinear. The result
  // belongs to this object's kind only and may outlive it. INVALID_ARGUMENT, RESOURCE_EXHAUSTED.
  absl::StatusOr<std::unique_ptr<LinearWeight>> Prepare(absl::Span<const HostTensor> parts,
                                                        absl::Span<const HostTensor> biases);

  // See Backend::Linear. A new number of rows costs a few tenths of a millisecond once.
  absl::Status Multiply(const LinearWeight& weight, Matrix in, Matrix out, LinearOutput mode);

 private:
  struct State;
  explicit OneDnnGemm(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace headstart
