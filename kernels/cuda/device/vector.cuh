// Eight bf16 values in 16 bytes, as fp32.
#pragma once

#include "kernels/cuda/device/numeric.cuh"

namespace headstart::cuda {

struct Float8 {
  float values[8];

  __device__ __forceinline__ float& operator[](int i) { return values[i]; }
  __device__ __forceinline__ float operator[](int i) const { return values[i]; }
};

__device__ __forceinline__ Float8 Unpack(uint4 packed) {
  const float2 a = UnpackBf16(packed.x), b = UnpackBf16(packed.y), c = UnpackBf16(packed.z),
               d = UnpackBf16(packed.w);
  return {{a.x, a.y, b.x, b.y, c.x, c.y, d.x, d.y}};
}

__device__ __forceinline__ uint4 Pack(const Float8& v) {
  return {PackBf16(v[0], v[1]), PackBf16(v[2], v[3]), PackBf16(v[4], v[5]), PackBf16(v[6], v[7])};
}

// Whether either of two bf16 has an exponent of all ones: is infinite or NaN.
__device__ __forceinline__ bool AnyNotFinite(uint32_t packed) {
  return (packed & 0x7F80u) == 0x7F80u || (packed & 0x7F800000u) == 0x7F800000u;
}

__device__ __forceinline__ bool AnyNotFinite(uint4 packed) {
  return AnyNotFinite(packed.x) || AnyNotFinite(packed.y) || AnyNotFinite(packed.z) ||
         AnyNotFinite(packed.w);
}

// Eight consecutive fp32 values, 16-byte aligned.
__device__ __forceinline__ Float8 LoadFloat8(const float* data) {
  const float4 a = __ldg(reinterpret_cast<const float4*>(data)),
               b = __ldg(reinterpret_cast<const float4*>(data) + 1);
  return {{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}};
}

}  // namespace headstart::cuda
