#include "kernels/cuda/launchers.h"

namespace headstart::cuda {
namespace {

constexpr int kThreads = 256;

// One CTA a row, 16 bytes a thread and step.
__global__ void __launch_bounds__(kThreads) EmbeddingKernel(const EmbeddingParams params) {
  const int vectors = static_cast<int>(params.hidden / 8);
  const auto* from =
      static_cast<const uint4*>(params.table) + int64_t{params.ids[blockIdx.x]} * vectors;
  auto* to = static_cast<uint4*>(params.out) + int64_t{blockIdx.x} * params.out_stride / 8;
  for (int i = threadIdx.x; i < vectors; i += kThreads) to[i] = __ldg(from + i);
}

}  // namespace

cudaError_t LaunchEmbedding(const EmbeddingParams& params, cudaStream_t stream) {
  EmbeddingKernel<<<static_cast<unsigned>(params.num_ids), kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace headstart::cuda
