// Attention of a single query row over pages as they lie in the cache: decoding, where packing the
// cache for one row would cost more than the row. Memory-bound. Internal linkage, see vec.h.
#pragma once

#include <cstdint>

#include "kernels/base/dtype.h"
#include "kernels/cpu/simd/attention_tile.h"
#include "kernels/cpu/simd/kernel_table.h"
#include "kernels/cpu/simd/vec.h"

namespace headstart::simd {
namespace {

// Query heads that share a pass over keys and values.
constexpr int64_t kRowHeads = 4;

// Some query heads of one KV head, on the tokens of RowArgs.
template <class Math>
struct RowHeads {
  using T = typename Math::Element;

  const RowArgs& args;
  const int64_t first_head;  // of the group
  const int64_t num_heads;   // 1 .. kRowHeads
  float s[kRowHeads][kRowTokens];

  RowHeads(const RowArgs& row_args, int64_t head)
      : args(row_args),
        first_head(head),
        num_heads(args.group_size - head < kRowHeads ? args.group_size - head : kRowHeads) {}

  const T* Keys(int64_t block) const {
    return static_cast<const T*>(args.kv->pages) +
           args.page_table[block] * args.kv->page_elements() +
           args.kv_head * kBlockTokens * args.head_dim;
  }
  const T* Values(int64_t block) const { return Keys(block) + args.kv->plane_elements(); }
  const T* Query(int64_t head) const {
    return static_cast<const T*>(args.q) + (first_head + head) * args.head_dim;
  }
  float* Partial(int64_t head) const {
    return args.partial + (first_head + head) * (args.head_dim + 2);
  }
  // Calls body(first token, block, tokens of the block) for the blocks of the range.
  template <typename Body>
  void ForBlocks(const Body& body) const {
    for (int64_t t = args.token_begin; t < args.token_end; t += kBlockTokens) {
      const int64_t left = args.token_end - t;
      body(t - args.token_begin, t / kBlockTokens, left < kBlockTokens ? left : kBlockTokens);
    }
  }
};

template <class Math>
inline float DotRow(const typename Math::Element* q, const typename Math::Element* k,
                    int64_t num_lanes) {
  const auto* a = reinterpret_cast<const float*>(q);
  const auto* b = reinterpret_cast<const float*>(k);
  F32 sum{};
  ForLanes(num_lanes, [&](int64_t i, int64_t count) {
    sum = Math::MultiplyAdd(LoadAs(a + i, count), LoadAs(b + i, count), sum);
  });
  return ReduceAdd(sum);
}

template <class Math>
void RowScores(RowHeads<Math>& h) {
  const int64_t d = h.args.head_dim;
  h.ForBlocks([&](int64_t first, int64_t block, int64_t tokens) {
    const auto* k = h.Keys(block);
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t head = 0; head < h.num_heads; ++head) {
        h.s[head][first + t] = DotRow<Math>(h.Query(head), k + t * d, d / Math::kPair);
      }
    }
  });
}

// Replaces the logits by p and writes what follows the output in a partial result: m and the sum.
template <class Math>
void RowSoftmax(RowHeads<Math>& h) {
  const float scale = kLog2E / __builtin_sqrtf(static_cast<float>(h.args.head_dim));
  const int64_t tokens = h.args.token_end - h.args.token_begin;
  const int64_t padded = RoundUp(tokens, kLanes);
  for (int64_t head = 0; head < h.num_heads; ++head) {
    float* s = h.s[head];
    for (int64_t t = tokens; t < padded; ++t) s[t] = kMasked;
    const float m = ReduceMax(MaskAndMax(s, padded, padded)) * scale;
    F32 sum{};
    for (int64_t t = 0; t < padded; t += kLanes) {
      const F32 p = Exp2<true>(Load(s + t) * scale - m);
      Store(p, s + t);
      sum += p;
    }
    h.Partial(head)[h.args.head_dim] = m;
    h.Partial(head)[h.args.head_dim + 1] = ReduceAdd(sum);
  }
}

// Adds p v of kTokens tokens in a row to the outputs.
template <int kTokens, class Math>
inline void AddTokens(const RowHeads<Math>& h, int64_t first, const typename Math::Element* v) {
  const int64_t d = h.args.head_dim;
  ForLanes(d, [&](int64_t i, int64_t count) {
    F32 value[kTokens];
    for (int t = 0; t < kTokens; ++t) value[t] = LoadAs(v + t * d + i, count);
    for (int64_t head = 0; head < h.num_heads; ++head) {
      F32 sum = LoadAs(h.Partial(head) + i, count);
      for (int t = 0; t < kTokens; ++t) sum += h.s[head][first + t] * value[t];
      StoreAs(sum, h.Partial(head) + i, count);
    }
  });
}

template <class Math>
void RowValues(const RowHeads<Math>& h) {
  const int64_t d = h.args.head_dim;
  for (int64_t head = 0; head < h.num_heads; ++head) {
    for (int64_t i = 0; i < d; ++i) h.Partial(head)[i] = 0;
  }
  h.ForBlocks([&](int64_t first, int64_t block, int64_t tokens) {
    const auto* v = h.Values(block);
    int64_t t = 0;
    for (; t + 8 <= tokens; t += 8) AddTokens<8>(h, first + t, v + t * d);
    for (; t < tokens; ++t) AddTokens<1>(h, first + t, v + t * d);
  });
}

template <class Math>
void AttentionRow(const RowArgs& args) {
  for (int64_t head = 0; head < args.group_size; head += kRowHeads) {
    RowHeads<Math> h(args, head);
    RowScores(h);
    RowSoftmax(h);
    RowValues(h);
  }
}

}  // namespace
}  // namespace headstart::simd
