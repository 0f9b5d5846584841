// Matrix products through cuBLASLt: bf16 operands, fp32 accumulation, bias and accumulation fused.
//
// A row's result does not depend on how many rows there are: every kind of product has one
// algorithm, without split-K, that is the measure (its sums are taken in one order whatever the
// number of rows), and others are taken only where they are faster and give its bits.
#pragma once

#include <cublasLt.h>

#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "kernels/backend.h"
#include "kernels/cuda/cuda_resources.h"

namespace headstart::cuda {

// Weight on the device in bf16, bias in the types of both outputs that a product may have.
class CudaLinearWeight : public LinearWeight {
 public:
  struct Memory {
    DeviceMemory weight, bias_bf16, bias_f32;  // the biases null where there is none
  };
  CudaLinearWeight(int64_t in_features, int64_t out_features, Memory memory)
      : LinearWeight(in_features, out_features), memory_(std::move(memory)) {}

  const void* weight() const { return memory_.weight.get(); }  // [out, in]
  // [out] or null.
  const void* bias(DType output) const {
    return output == DType::kF32 ? memory_.bias_f32.get() : memory_.bias_bf16.get();
  }

 private:
  Memory memory_;
};

class CublasLtGemm {
 public:
  // `fastest`: whatever is fastest for a number of rows, its sums may be taken in another order.
  static absl::StatusOr<std::unique_ptr<CublasLtGemm>> Create(bool fastest);
  ~CublasLtGemm();

  // out = in W^T + b, or out += it. out: bf16 or f32. Enqueues on `stream`. The first product of a
  // shape looks for the fastest algorithm, with trial runs; numbers of rows share one search up to
  // the next power of two. INTERNAL, too, where the measure does not take a number of rows.
  absl::Status Multiply(const CudaLinearWeight& weight, const Matrix& in, const Matrix& out,
                        LinearOutput mode, cudaStream_t stream);

 private:
  struct Problem;
  struct Comparison;
  // out_features, in_features, output dtype, mode, bias, input and output strides.
  using Kind = std::tuple<int64_t, int64_t, int, int, bool, int64_t, int64_t>;
  using Algorithms = std::vector<cublasLtMatmulAlgo_t>;

  CublasLtGemm(cublasLtHandle_t handle, bool fastest, DeviceMemory workspace, DeviceMemory differs,
               Event begin, Event end);
  static Kind KindOf(const Problem& problem);
  // What the library proposes for the problem, best first; some.
  absl::StatusOr<Algorithms> Candidates(const Problem& problem);
  // Whether the algorithm takes the problem.
  bool Takes(const Problem& problem, const cublasLtMatmulAlgo_t& algorithm);
  // The algorithm whose bits all others of the problem's kind must give.
  absl::StatusOr<cublasLtMatmulAlgo_t> MeasureOf(const Problem& problem);
  absl::StatusOr<cublasLtMatmulAlgo_t> WithoutSearch(const Problem& problem);
  // Those that may be taken for the problem; some.
  absl::StatusOr<Algorithms> Allowed(const Problem& problem, cudaStream_t stream);
  absl::StatusOr<Comparison> Compare(const Problem& problem, const cublasLtMatmulAlgo_t& measure,
                                     cudaStream_t stream);
  absl::StatusOr<bool> GivesSameBits(const Comparison& comparison,
                                     const cublasLtMatmulAlgo_t& algorithm, cudaStream_t stream);
  absl::StatusOr<cublasLtMatmulAlgo_t> FindFastest(const Problem& problem, cudaStream_t stream);
  absl::StatusOr<float> Time(const Problem& problem, const cublasLtMatmulAlgo_t& algorithm,
                             void* target, cudaStream_t stream);
  absl::Status Run(const Problem& problem, const cublasLtMatmulAlgo_t& algorithm, void* target,
                   cudaStream_t stream);

  cublasLtHandle_t handle_;
  const bool fastest_;
  DeviceMemory workspace_;
  DeviceMemory differs_;  // one u32, see LaunchCompare
  Event begin_, end_;
  absl::flat_hash_map<Kind, cublasLtMatmulAlgo_t> measures_;
  absl::flat_hash_map<std::pair<Kind, int64_t>, cublasLtMatmulAlgo_t> algorithms_;  // rounded rows
};

}  // namespace headstart::cuda
