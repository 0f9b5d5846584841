// Attention of a single query row over pages as they lie in the cache: decoding, where packing the
// cache for one row would cost more than the row. Memory-bound. Internal linkage, see vec.h.
#pragma once

#include <cstdint>

#include "kernels/base/dtype.h"
#include "kernels/cpu/simd/elementwise.h"
#include "kernels/cpu/simd/kernel_table.h"
#include "kernels/cpu/simd/vec.h"

namespace headstart::simd {
namespace {

// First key of a block of this head; its values lie plane_elements() further on.
template <typename T>
inline const T* KeyRows(const RowArgs& args, int64_t block) {
  const KvPages& kv = *args.kv;
  return static_cast<const T*>(kv.pages) + kv.page_table[block] * kv.page_elements() +
         args.kv_head * kBlockTokens * args.head_dim;
}

inline int64_t TokensOf(const RowArgs& args, int64_t block) {
  const int64_t left = args.token_end - block * kBlockTokens;
  return left < kBlockTokens ? left : kBlockTokens;
}

template <typename T>
inline float Dot(const float* q, const T* k, int64_t n) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += q[i] * ToFloat(k[i]);
  return sum;
}

// out += p[0] v[0] + … + p[3] v[3], rows of n values.
template <typename T>
inline void AddFourRows(const float* p, const T* v, int64_t n, float* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    out[i] += (p[0] * ToFloat(v[i]) + p[1] * ToFloat(v[i + n])) +
              (p[2] * ToFloat(v[i + 2 * n]) + p[3] * ToFloat(v[i + 3 * n]));
  }
}

// Replaces logits by 2^(logit - m) in place; returns their sum. n is a multiple of kLanes; logits
// behind the last token are minus infinity's stand-in.
inline float ExpInPlace(float* s, int64_t n, float m) {
  F32 sum{};
  for (int64_t i = 0; i < n; i += kLanes) {
    const F32 p = Exp2<true>(Load(s + i) - m);
    Store(p, s + i);
    sum += p;
  }
  return ReduceAdd(sum);
}

template <typename T>
void OneHead(const RowArgs& args, const float* q, float* partial) {
  const int64_t d = args.head_dim;
  const int64_t first = args.token_begin / kBlockTokens;
  const int64_t last = NumBlocks(args.token_end);
  float s[kRowTokens];
  float m = -1e30f;
  for (int64_t i = 0; i < (last - first) * kBlockTokens; ++i) s[i] = -1e30f;
  for (int64_t block = first; block < last; ++block) {
    const T* k = KeyRows<T>(args, block);
    float* logits = s + (block - first) * kBlockTokens;
    for (int64_t t = 0; t < TokensOf(args, block); ++t) {
      logits[t] = Dot(q, k + t * d, d);
      m = logits[t] > m ? logits[t] : m;
    }
  }
  for (int64_t i = 0; i < d; ++i) partial[i] = 0;
  partial[d] = m;
  partial[d + 1] = ExpInPlace(s, (last - first) * kBlockTokens, m);
  for (int64_t block = first; block < last; ++block) {
    const T* v = KeyRows<T>(args, block) + args.kv->plane_elements();
    const float* p = s + (block - first) * kBlockTokens;
    const int64_t tokens = TokensOf(args, block);
    int64_t t = 0;
    for (; t + 4 <= tokens; t += 4) AddFourRows(p + t, v + t * d, d, partial);
    for (; t < tokens; ++t) {
      for (int64_t i = 0; i < d; ++i) partial[i] += p[t] * ToFloat(v[t * d + i]);
    }
  }
}

template <typename T>
void AttentionRow(const RowArgs& args) {
  const float scale = kLog2E / __builtin_sqrtf(static_cast<float>(args.head_dim));
  for (int64_t head = 0; head < args.group_size; ++head) {
    float q[kMaxHeadDim];
    const T* row = static_cast<const T*>(args.q) + head * args.head_dim;
    for (int64_t i = 0; i < args.head_dim; ++i) q[i] = ToFloat(row[i]) * scale;
    OneHead<T>(args, q, args.partial + head * (args.head_dim + 2));
  }
}

}  // namespace
}  // namespace headstart::simd
