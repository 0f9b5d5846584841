// Row kernels of the elementwise operations. Plain loops that the compiler vectorises; internal
// linkage, see vec.h. T is float or BFloat16; sums and products are fp32, results are rounded once.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "kernels/base/dtype.h"
#include "kernels/cpu/simd/kernel_table.h"

namespace headstart::simd {
namespace {

template <typename T>
inline float ToFloat(T x) {
  return static_cast<float>(x);
}

inline float SumOfSquares(const float* x, int64_t n) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += x[i] * x[i];
  return sum;
}

inline float InverseRms(const float* x, float eps, int64_t n) {
  return 1.0f / __builtin_sqrtf(SumOfSquares(x, n) / static_cast<float>(n) + eps);
}

template <typename T>
void RmsNorm(const float* x, const float* weight, float eps, int64_t n, void* out) {
  const float scale = InverseRms(x, eps, n);
  T* y = static_cast<T*>(out);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) y[i] = T(x[i] * scale * weight[i]);
}

template <typename T>
void RopeHead(const void* in, const float* cos, const float* sin, const float* norm, float norm_eps,
              int64_t head_dim, void* out) {
  float x[kMaxHeadDim];
  const T* source = static_cast<const T*>(in);
#pragma omp simd
  for (int64_t i = 0; i < head_dim; ++i) x[i] = ToFloat(source[i]);
  if (norm != nullptr) {
    const float scale = InverseRms(x, norm_eps, head_dim);
#pragma omp simd
    for (int64_t i = 0; i < head_dim; ++i) x[i] = x[i] * scale * norm[i];
  }
  const int64_t half = head_dim / 2;
  T* y = static_cast<T*>(out);
#pragma omp simd
  for (int64_t i = 0; i < half; ++i) {
    y[i] = T(x[i] * cos[i] - x[i + half] * sin[i]);
    y[i + half] = T(x[i + half] * cos[i] + x[i] * sin[i]);
  }
}

// e^x; relative error below 2e-7. 0 and infinity where float underflows and overflows.
inline float Exp(float x) {
  float t = x * 1.44269504f;
  t = t < -127.0f ? -127.0f : t;
  t = t > 128.0f ? 128.0f : t;
  int32_t whole = static_cast<int32_t>(t);
  whole -= static_cast<float>(whole) > t ? 1 : 0;
  const float f = t - static_cast<float>(whole);
  float p = 0.0018775767f;
  p = p * f + 0.0089893397f;
  p = p * f + 0.0558263180f;
  p = p * f + 0.2401536107f;
  p = p * f + 0.6931530833f;
  p = p * f + 0.9999999404f;
  return p * std::bit_cast<float>((whole + 127) << 23);
}

template <typename T>
void SwiGlu(const void* gate, const void* up, int64_t n, void* out) {
  const T* g = static_cast<const T*>(gate);
  const T* u = static_cast<const T*>(up);
  T* y = static_cast<T*>(out);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float x = ToFloat(g[i]);
    y[i] = T(x / (1.0f + Exp(-x)) * ToFloat(u[i]));
  }
}

template <typename T>
void ToFloatRow(const void* in, int64_t n, float* out) {
  const T* x = static_cast<const T*>(in);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = ToFloat(x[i]);
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
bool CopyFinite(const void* in, int64_t n, void* out) {
  using B = typename Bits<T>::Type;
  const B* x = static_cast<const B*>(in);
  B* y = static_cast<B*>(out);
  B bad = 0;
#pragma omp simd reduction(| : bad)
  for (int64_t i = 0; i < n; ++i) {
    y[i] = x[i];
    bad |= static_cast<B>((x[i] & Bits<T>::kExponent) == Bits<T>::kExponent);
  }
  return bad == 0;
}

template <typename T>
constexpr ElementKernels ElementKernelsFor() {
  return {RmsNorm<T>, RopeHead<T>, SwiGlu<T>, ToFloatRow<T>, CopyFinite<T>};
}

}  // namespace
}  // namespace headstart::simd
