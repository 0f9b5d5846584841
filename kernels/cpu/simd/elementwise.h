// Row kernels of the elementwise operations. Internal linkage, see vec.h. T is float or BFloat16;
// sums and products are fp32, results are rounded once.
#pragma once

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

template <typename T>
constexpr ElementKernels ElementKernelsFor() {
  return {RmsNorm<T>, RopeHead<T>, SwiGlu<T>, ToFloatRow<T>, AllFinite<T>};
}

}  // namespace
}  // namespace headstart::simd
