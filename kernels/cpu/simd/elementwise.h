// Row kernels of the elementwise operations. Internal linkage, see vec.h. T is float or BFloat16;
// sums and products are fp32, results are rounded once.
#pragma once

#include <bit>
#include <cstdint>

#include "kernels/base/dtype.h"
#include "kernels/cpu/simd/kernel_table.h"
#include "kernels/cpu/simd/vec.h"

namespace headstart::simd {
namespace {

template <typename T>
inline float ToFloat(T x) {
  return static_cast<float>(x);
}

inline float InverseRms(const float* x, float eps, int64_t n) {
  F32 sum{};
  ForLanes(n, [&](int64_t i, int64_t count) {
    const F32 v = LoadAs(x + i, count);
    sum += v * v;
  });
  return 1.0f / __builtin_sqrtf(ReduceAdd(sum) / static_cast<float>(n) + eps);
}

template <typename T>
void RmsNorm(const float* x, const float* weight, float eps, int64_t n, void* out) {
  const float scale = InverseRms(x, eps, n);
  T* y = static_cast<T*>(out);
  ForLanes(n, [&](int64_t i, int64_t count) {
    StoreAs(LoadAs(x + i, count) * scale * LoadAs(weight + i, count), y + i, count);
  });
}

template <typename T>
void ToFloatRow(const void* in, int64_t n, float* out) {
  const T* x = static_cast<const T*>(in);
  ForLanes(n, [&](int64_t i, int64_t count) { StoreAs(LoadAs(x + i, count), out + i, count); });
}

template <typename T>
void RopeHead(const void* in, const float* cos, const float* sin, const float* norm, float norm_eps,
              int64_t head_dim, void* out) {
  alignas(64) float x[kMaxHeadDim];
  ToFloatRow<T>(in, head_dim, x);
  if (norm != nullptr) RmsNorm<float>(x, norm, norm_eps, head_dim, x);
  const int64_t half = head_dim / 2;
  T* y = static_cast<T*>(out);
  ForLanes(half, [&](int64_t i, int64_t count) {
    const F32 a = LoadAs(x + i, count);
    const F32 b = LoadAs(x + half + i, count);
    const F32 c = LoadAs(cos + i, count);
    const F32 s = LoadAs(sin + i, count);
    StoreAs(a * c - b * s, y + i, count);
    StoreAs(b * c + a * s, y + half + i, count);
  });
}

template <typename T>
void SwiGlu(const void* gate, const void* up, int64_t n, void* out) {
  const T* g = static_cast<const T*>(gate);
  const T* u = static_cast<const T*>(up);
  T* y = static_cast<T*>(out);
  ForLanes(n, [&](int64_t i, int64_t count) {
    const F32 x = LoadAs(g + i, count);
    // At most 2^126, so that the sum stays finite: silu is 0 there all the same.
    const F32 power = x * -kLog2E;
    const F32 exp = Exp2<true>(power > 126.0f ? Broadcast(126.0f) : power);
    StoreAs(x / (exp + 1.0f) * LoadAs(u + i, count), y + i, count);
  });
}

// Bits that are all set only in infinities and NaN.
template <typename T>
struct Bits;
template <>
struct Bits<float> {
  using Type = uint32_t;
  static constexpr Type kExponent = 0x7f800000u;
};
template <>
struct Bits<BFloat16> {
  using Type = uint16_t;
  static constexpr Type kExponent = 0x7f80u;
};

template <typename T>
bool AllFinite(const void* in, int64_t n) {
  using B = typename Bits<T>::Type;
  const B* x = static_cast<const B*>(in);
  B bad = 0;
#pragma omp simd reduction(| : bad)
  for (int64_t i = 0; i < n; ++i) {
    bad |= static_cast<B>((x[i] & Bits<T>::kExponent) == Bits<T>::kExponent);
  }
  return bad == 0;
}

inline uint32_t FloatBits(float x) { return std::bit_cast<uint32_t>(x); }
inline uint32_t FloatBits(BFloat16 x) { return static_cast<uint32_t>(x.bits) << 16; }

// The nearest E4M3 number, ties to even, at most 448 in magnitude. NaN becomes 0x7f. Without
// branches, so that it runs in lanes.
inline uint8_t ToFloat8E4M3(float x) {
  constexpr uint32_t kInfinity = 0x7f800000u;
  constexpr uint32_t kMax = std::bit_cast<uint32_t>(kMaxFloat8E4M3);
  constexpr uint32_t kLeastNormal = std::bit_cast<uint32_t>(0x1p-6f);
  constexpr float kUnitIs2ToMinus9 = 0x1p14f;  // sums with it are rounded to E4M3's subnormals
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t capped = magnitude < kMax ? magnitude : kMax;
  // The exponent's bias falls from 127 to 7, the mantissa from 23 bits to 3.
  const uint32_t normal = ((capped + 0x7ffffu + ((capped >> 20) & 1u)) >> 20) - (120u << 3);
  const uint32_t subnormal =
      std::bit_cast<uint32_t>(std::bit_cast<float>(capped) + kUnitIs2ToMinus9) -
      std::bit_cast<uint32_t>(kUnitIs2ToMinus9);
  const uint32_t number = (capped < kLeastNormal ? subnormal : normal) | ((bits >> 24) & 0x80u);
  return static_cast<uint8_t>(magnitude > kInfinity ? 0x7fu : number);
}

template <typename T>
float Quantize(const void* in, int64_t n, uint8_t* out) {
  const T* x = static_cast<const T*>(in);
  uint32_t largest = 0;  // magnitudes are ordered as their bits
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t magnitude = FloatBits(x[i]) & 0x7fffffffu;
    largest = magnitude > largest ? magnitude : largest;
  }
  const float scale = std::bit_cast<float>(largest) / kMaxFloat8E4M3;
  const float divisor = scale > 0.0f ? scale : __builtin_inff();
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    out[i] = ToFloat8E4M3(std::bit_cast<float>(FloatBits(x[i])) / divisor);
  }
  return scale;
}

template <typename T>
constexpr ElementKernels ElementKernelsFor() {
  return {RmsNorm<T>, RopeHead<T>, SwiGlu<T>, ToFloatRow<T>, AllFinite<T>, Quantize<T>};
}

}  // namespace
}  // namespace headstart::simd
