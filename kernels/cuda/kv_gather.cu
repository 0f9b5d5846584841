#include "kernels/cuda/device/vector.cuh"
#include "kernels/cuda/launchers.h"

namespace headstart::cuda {
namespace {

constexpr int kThreads = 256;

// Whether either of two bf16 has an exponent of all ones.
__device__ __forceinline__ bool AnyNotFinite(uint32_t packed) {
  return (packed & 0x7F80u) == 0x7F80u || (packed & 0x7F800000u) == 0x7F800000u;
}

// A thread copies 16 bytes of a plane (blockIdx.y): K heads, then V heads, in the page and in the
// output alike.
__global__ void __launch_bounds__(kThreads) KvGatherKernel(const KvGatherParams params) {
  const int64_t head_dim = params.kv.shape.head_dim;
  const int64_t element = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * 8, plane = blockIdx.y;
  if (element >= params.token_count * head_dim) return;
  const int64_t token = params.token_begin + element / head_dim;
  const int64_t page = params.kv.page_table[token / kBlockTokens];
  const auto* from = static_cast<const Bf16*>(params.kv.pages) + page * params.kv.page_elements() +
                     (plane * kBlockTokens + token % kBlockTokens) * head_dim + element % head_dim;
  const uint4 value = __ldg(reinterpret_cast<const uint4*>(from));
  if (AnyNotFinite(value.x) || AnyNotFinite(value.y) || AnyNotFinite(value.z) ||
      AnyNotFinite(value.w)) {
    *params.not_finite = 1;
  }
  *reinterpret_cast<uint4*>(static_cast<Bf16*>(params.out) + plane * params.token_count * head_dim +
                            element) = value;
}

}  // namespace

cudaError_t LaunchKvGather(const KvGatherParams& params, cudaStream_t stream) {
  const int64_t work = params.token_count * params.kv.shape.head_dim / 8;
  const dim3 grid(static_cast<unsigned>((work + kThreads - 1) / kThreads),
                  2 * params.kv.shape.num_kv_heads);
  KvGatherKernel<<<grid, kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace headstart::cuda
