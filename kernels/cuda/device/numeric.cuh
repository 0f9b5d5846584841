// Scalar arithmetic, packing and reductions that several kernels share.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "kernels/cuda/device/mbarrier.cuh"

namespace headstart::cuda {

using Bf16 = __nv_bfloat16;

inline constexpr float kLog2E = 1.4426950408889634f;

__device__ __forceinline__ float Exp2Approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 2^x on the FMA pipe (relative error 1e-4, below bf16's rounding of a probability): relieves the
// special-function unit.
__device__ __forceinline__ float Exp2Polynomial(float x) {
  x = fmaxf(x, -126.0f);
  const float rounded = x + 12582912.0f;  // its low bits hold round(x)
  const float f = x - (rounded - 12582912.0f);
  float p = fmaf(0.0558382829f, f, 0.2426394785f);
  p = fmaf(p, f, 0.6931367339f);
  p = fmaf(p, f, 0.9999245570f);
  return __int_as_float(__float_as_int(p) + (__float_as_int(rounded) << 23));
}

__device__ __forceinline__ uint32_t PackBf16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
__device__ __forceinline__ float2 UnpackBf16(uint32_t packed) {
  return {__uint_as_float(packed << 16), __uint_as_float(packed & 0xFFFF0000u)};
}

// Maximum over the four lanes that share a row of wgmma accumulators.
__device__ __forceinline__ float QuadMax(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
__device__ __forceinline__ int QuadMax(int x) {
  x = max(x, __shfl_xor_sync(~0u, x, 1));
  return max(x, __shfl_xor_sync(~0u, x, 2));
}
__device__ __forceinline__ float QuadSum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

__device__ __forceinline__ float WarpSum(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) x += __shfl_xor_sync(~0u, x, offset);
  return x;
}

// Sum over a CTA of kThreads, in a fixed order; every thread gets it. `scratch`: one float a warp.
// Two calls on one scratch need a barrier between them.
template <int kThreads>
__device__ __forceinline__ float BlockSum(float x, float* scratch) {
  x = WarpSum(x);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  float sum = 0.0f;
#pragma unroll
  for (int w = 0; w < kThreads / 32; ++w) sum += scratch[w];
  return sum;
}

// Unsigned integers in the order of the floats (no NaN).
__device__ __forceinline__ uint32_t OrderedBits(float x) {
  const uint32_t bits = __float_as_uint(x);
  return bits ^ ((bits >> 31) != 0 ? 0xFFFFFFFFu : 0x80000000u);
}

// Stores four 8x8 matrices of 16-bit values, the layout of wgmma accumulators, to shared memory.
__device__ __forceinline__ void StoreMatrices(uint32_t address, uint32_t r0, uint32_t r1,
                                              uint32_t r2, uint32_t r3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(r0), "r"(r1), "r"(r2), "r"(r3)
               : "memory");
}

}  // namespace headstart::cuda
