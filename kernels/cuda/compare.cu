#include <algorithm>

#include "kernels/cuda/launchers.h"

namespace headstart::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 1024;

__global__ void __launch_bounds__(kThreads) CompareKernel(const CompareParams params) {
  const auto* const a = static_cast<const uint32_t*>(params.a);
  const auto* const b = static_cast<const uint32_t*>(params.b);
  const int64_t words = params.bytes / 4, step = int64_t{gridDim.x} * kThreads;
  bool differs = false;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < words; i += step) {
    differs |= a[i] != b[i];
  }
  if (differs) *params.differs = 1;
}

}  // namespace

cudaError_t LaunchCompare(const CompareParams& params, cudaStream_t stream) {
  const cudaError_t cleared = cudaMemsetAsync(params.differs, 0, sizeof(uint32_t), stream);
  if (cleared != cudaSuccess) return cleared;
  const int64_t blocks = (params.bytes / 4 + kThreads - 1) / kThreads;
  CompareKernel<<<static_cast<unsigned>(std::clamp(blocks, int64_t{1}, kMaxBlocks)), kThreads, 0,
                  stream>>>(params);
  return cudaGetLastError();
}

}  // namespace headstart::cuda
