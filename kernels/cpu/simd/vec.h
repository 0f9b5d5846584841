// One SIMD register of floats, as wide as this translation unit is compiled for, and what attention
// needs of it. Everything has internal linkage: each instruction set gets its own copy.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "kernels/base/dtype.h"

namespace headstart::simd {
namespace {

#if defined(__AVX512F__)
constexpr int kVecBytes = 64;
#elif defined(__AVX2__)
constexpr int kVecBytes = 32;
#else
constexpr int kVecBytes = 16;
#endif
constexpr int kLanes = kVecBytes / 4;

constexpr float kLog2E = 1.44269504f;

using F32 = float __attribute__((vector_size(kVecBytes)));
using I32 = int32_t __attribute__((vector_size(kVecBytes)));

inline F32 Load(const float* p) {
  F32 v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

inline void Store(F32 v, float* p) { std::memcpy(p, &v, sizeof(v)); }

// Elements of a compute type to floats and back, rounded to nearest.
inline F32 LoadAs(const float* p) { return Load(p); }
inline void StoreAs(F32 v, float* p) { Store(v, p); }
#if defined(__AVX512BF16__)
inline F32 LoadAs(const BFloat16* p) {
  const __m512i wide =
      _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return reinterpret_cast<F32>(_mm512_slli_epi32(wide, 16));
}
inline void StoreAs(F32 v, BFloat16* p) {
  const __m256bh narrow = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(v));
  std::memcpy(p, &narrow, sizeof(narrow));
}
#endif

// The first `count` lanes, 1 .. kLanes; the others are zero, or not stored.
template <typename T>
inline F32 LoadAs(const T* p, int64_t count) {
  if (count == kLanes) return LoadAs(p);
  T lanes[kLanes] = {};
  std::memcpy(lanes, p, count * sizeof(T));
  return LoadAs(lanes);
}
template <typename T>
inline void StoreAs(F32 v, T* p, int64_t count) {
  if (count == kLanes) return StoreAs(v, p);
  T lanes[kLanes];
  StoreAs(v, lanes);
  std::memcpy(p, lanes, count * sizeof(T));
}

// Calls body(i, count) for the registers that cover [0, n): whole ones, then what is left.
template <typename Body>
inline void ForLanes(int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) body(i, kLanes);
  if (i < n) body(i, n - i);
}

inline F32 Broadcast(float x) { return x - F32{}; }

// The 32 bits at p in every lane, whatever they are.
inline F32 BroadcastBits(const float* p) {
#if defined(__AVX512F__)
  return reinterpret_cast<F32>(_mm512_set1_ps(*p));
#else
  return Broadcast(*p);
#endif
}

inline F32 Max(F32 a, F32 b) { return a > b ? a : b; }

inline I32 LaneIndex() {
  I32 v;
  for (int i = 0; i < kLanes; ++i) v[i] = i;
  return v;
}

template <int kStep, int... kLane>
inline F32 SwapLanes(F32 v, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(v, v, (kLane ^ kStep)...);
}

// Every lane becomes the maximum, or the sum, of its aligned group of kGroup lanes.
template <int kGroup, int kStep = 1>
inline F32 GroupMax(F32 v) {
  if constexpr (kStep == kGroup) {
    return v;
  } else {
    const F32 other = SwapLanes<kStep>(v, std::make_integer_sequence<int, kLanes>());
    return GroupMax<kGroup, kStep * 2>(Max(v, other));
  }
}
template <int kGroup, int kStep = 1>
inline F32 GroupAdd(F32 v) {
  if constexpr (kStep == kGroup) {
    return v;
  } else {
    const F32 other = SwapLanes<kStep>(v, std::make_integer_sequence<int, kLanes>());
    return GroupAdd<kGroup, kStep * 2>(v + other);
  }
}

inline float ReduceMax(F32 v) { return GroupMax<kLanes>(v)[0]; }
inline float ReduceAdd(F32 v) { return GroupAdd<kLanes>(v)[0]; }

// One step of Transpose: exchanges the off-diagonal blocks of kStep x kStep lanes.
template <int kStep, int... kLane>
inline void ExchangeBlocks(F32& a, F32& b, std::integer_sequence<int, kLane...>) {
  const F32 low =
      __builtin_shufflevector(a, b, (kLane & kStep ? kLanes + kLane - kStep : kLane)...);
  b = __builtin_shufflevector(a, b, (kLane & kStep ? kLanes + kLane : kLane + kStep)...);
  a = low;
}

// Transposes a square of 32-bit lanes: rows[i][j] and rows[j][i] change places.
template <int kStep = kLanes / 2>
inline void Transpose(F32 (&rows)[kLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & kStep) continue;
    ExchangeBlocks<kStep>(rows[i], rows[i + kStep], std::make_integer_sequence<int, kLanes>());
  }
  if constexpr (kStep > 1) Transpose<kStep / 2>(rows);
}

// Whether some a[i] > b[i].
inline bool AnyGreater(F32 a, F32 b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), _CMP_GT_OQ) !=
         0;
#else
  const I32 greater = a > b;
  int32_t any = 0;
  for (int i = 0; i < kLanes; ++i) any |= greater[i];
  return any != 0;
#endif
}

// 2^f on [0, 1), minimax in relative error: 7.5e-8 with `kExact`, else 7.5e-5, which is far below
// what rounding to bf16 adds.
template <bool kExact>
inline F32 Exp2Fraction(F32 f) {
  if constexpr (kExact) {
    F32 p = Broadcast(0.0018775767f);
    p = p * f + 0.0089893397f;
    p = p * f + 0.0558263180f;
    p = p * f + 0.2401536107f;
    p = p * f + 0.6931530833f;
    return p * f + 0.9999999404f;
  } else {
    F32 p = Broadcast(0.0780245215f);
    p = p * f + 0.2260671556f;
    p = p * f + 0.6958335638f;
    return p * f + 0.9999251962f;
  }
}

// 2^x for x <= 127; 0 below about -127. NaN stays NaN.
template <bool kExact>
inline F32 Exp2(F32 x) {
#if defined(__AVX512F__)
  const __m512 v = reinterpret_cast<__m512>(x);
  const __m512 whole = _mm512_roundscale_ps(v, _MM_FROUND_TO_NEG_INF);
  const F32 power = Exp2Fraction<kExact>(x - reinterpret_cast<F32>(whole));
  return reinterpret_cast<F32>(_mm512_scalef_ps(reinterpret_cast<__m512>(power), whole));
#else
  const F32 low = Broadcast(-127.0f);
  x = x < low ? low : x;
  I32 whole = __builtin_convertvector(x, I32);
  whole += __builtin_convertvector(whole, F32) > x;  // a true lane is -1: floor
  const F32 p = Exp2Fraction<kExact>(x - __builtin_convertvector(whole, F32));
  const I32 exponent = (whole + 127) << 23;
  return p * reinterpret_cast<F32>(exponent);
#endif
}

inline float Exp2Scalar(float x) { return Exp2<true>(Broadcast(x))[0]; }

}  // namespace
}  // namespace headstart::simd
