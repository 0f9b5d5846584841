// KV pages to fp8 with a scale for each plane and head.
#include "kernels/cuda/device/vector.cuh"
#include "kernels/cuda/launchers.h"

namespace headstart::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kVector = 8;  // bf16 in 16 bytes, numbers in 8

// Two E4M3 numbers, rounded to nearest even, at most 448 in magnitude.
__device__ __forceinline__ uint32_t PackFloat8(float low, float high) {
  uint16_t packed;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(packed) : "f"(high), "f"(low));
  return packed;
}

__device__ __forceinline__ uint2 PackFloat8(const Float8& v, float divisor) {
  Float8 q;
#pragma unroll
  for (int e = 0; e < kVector; ++e) q[e] = __fdiv_rn(v[e], divisor);
  return {PackFloat8(q[0], q[1]) | PackFloat8(q[2], q[3]) << 16,
          PackFloat8(q[4], q[5]) | PackFloat8(q[6], q[7]) << 16};
}

// The greatest magnitude among 8 bf16, as the bits of an fp32: magnitudes are ordered as their
// bits.
__device__ __forceinline__ uint32_t GreatestMagnitude(uint4 packed) {
  constexpr uint32_t kMagnitudes = 0x7FFF7FFFu;
  const uint32_t pairs = __vmaxu2(__vmaxu2(packed.x & kMagnitudes, packed.y & kMagnitudes),
                                  __vmaxu2(packed.z & kMagnitudes, packed.w & kMagnitudes));
  return max(pairs << 16, pairs & 0xFFFF0000u);
}

// Maximum over the CTA; every thread gets it.
__device__ __forceinline__ uint32_t BlockMax(uint32_t x) {
  __shared__ uint32_t of_warps[kThreads / 32];
  x = __reduce_max_sync(~0u, x);
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = x;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kThreads / 32; ++w) x = max(x, of_warps[w]);
  return x;
}

// A CTA makes one head of a page's K or V (blockIdx.x: plane) and keeps it in registers between
// its one reading and its one writing.
template <int kHeadDim>
__global__ void __launch_bounds__(kThreads)
    QuantizeKvKernel(const __grid_constant__ QuantizeKvParams params) {
  constexpr int kHeadElements = kBlockTokens * kHeadDim;
  constexpr int kVectors = kHeadElements / kVector / kThreads;  // of a thread
  const auto [page, num_tokens] = params.pages[blockIdx.y];
  const int plane = blockIdx.x, end = num_tokens * kHeadDim;
  const auto* in = static_cast<const Bf16*>(params.kv.pages) + page * params.kv.page_elements() +
                   int64_t{plane} * kHeadElements;
  char* const out = static_cast<char*>(params.out) + blockIdx.y * Fp8PageBytes(params.kv.shape);
  uint4 head[kVectors];
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int element = (i * kThreads + static_cast<int>(threadIdx.x)) * kVector;
    head[i] = element < end ? *reinterpret_cast<const uint4*>(in + element) : uint4{};
    largest = max(largest, GreatestMagnitude(head[i]));
  }
  const float scale = __fdiv_rn(__uint_as_float(BlockMax(largest)), kMaxFloat8E4M3);
  const float divisor = scale > 0.0f ? scale : __uint_as_float(0x7F800000u);
  if (threadIdx.x == 0) reinterpret_cast<float*>(out)[plane] = scale;
  char* const numbers = out + Fp8ScaleBytes(params.kv.shape) + int64_t{plane} * kHeadElements;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int element = (i * kThreads + static_cast<int>(threadIdx.x)) * kVector;
    if (element >= end) break;
    *reinterpret_cast<uint2*>(numbers + element) = PackFloat8(Unpack(head[i]), divisor);
  }
}

}  // namespace

cudaError_t LaunchQuantizeKv(const QuantizeKvParams& params, cudaStream_t stream) {
  if (params.num_pages < 1 || params.num_pages > kMaxQuantizedPages) return cudaErrorInvalidValue;
  const dim3 grid(2 * params.kv.shape.num_kv_heads, params.num_pages);
  switch (params.kv.shape.head_dim) {
    case 64:
      QuantizeKvKernel<64><<<grid, kThreads, 0, stream>>>(params);
      break;
    case 128:
      QuantizeKvKernel<128><<<grid, kThreads, 0, stream>>>(params);
      break;
    default:
      return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}

}  // namespace headstart::cuda
