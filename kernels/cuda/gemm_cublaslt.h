// Matrix products through cuBLASLt: bf16 operands, fp32 accumulation, bias and accumulation fused.
#pragma once

#include <cublasLt.h>

#include <memory>
#include <tuple>
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
  static absl::StatusOr<std::unique_ptr<CublasLtGemm>> Create();
  ~CublasLtGemm();

  // out = in W^T + b, or out += it. out: bf16 or f32. Enqueues on `stream`. The first product of a
  // shape looks for the fastest algorithm, with trial runs when it is large; numbers of rows share
  // one search up to the next power of two.
  absl::Status Multiply(const CudaLinearWeight& weight, const Matrix& in, const Matrix& out,
                        LinearOutput mode, cudaStream_t stream);

 private:
  struct Problem;
  // out_features, in_features, rounded rows, output dtype, mode, bias, input and output strides.
  using Key = std::tuple<int64_t, int64_t, int64_t, int, int, bool, int64_t, int64_t>;

  CublasLtGemm(cublasLtHandle_t handle, DeviceMemory workspace, Event begin, Event end);
  absl::StatusOr<cublasLtMatmulAlgo_t> FindAlgorithm(const Problem& problem, cudaStream_t stream);
  absl::StatusOr<std::vector<cublasLtMatmulHeuristicResult_t>> Candidates(const Problem& problem);
  absl::StatusOr<float> Time(const Problem& problem, const cublasLtMatmulAlgo_t& algorithm,
                             void* target, cudaStream_t stream);
  absl::Status Run(const Problem& problem, const cublasLtMatmulAlgo_t& algorithm, void* target,
                   cudaStream_t stream);

  cublasLtHandle_t handle_;
  DeviceMemory workspace_;
  Event begin_, end_;
  absl::flat_hash_map<Key, cublasLtMatmulAlgo_t> algorithms_;
};

}  // namespace headstart::cuda
