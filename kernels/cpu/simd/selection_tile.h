// Block selection over packed pages, on attention's micro-kernel. Internal linkage, see vec.h.
#pragma once

#include <cstdint>

#include "kernels/cpu/simd/attention_tile.h"
#include "kernels/cpu/simd/elementwise.h"
#include "kernels/cpu/simd/selection_kernels.h"
#include "kernels/cpu/simd/vec.h"

namespace headstart::simd {
namespace {

static_assert(kStatsAlign % kLanes == 0);

// Maximum and sum of the blocks of kBlockKeys keys of one row of masked logits.
template <int kBlockKeys>
inline void RowStats(const float* s, int64_t num_keys, float scale, float* max, float* sum) {
  constexpr int kGroup = kBlockKeys < kLanes ? kBlockKeys : kLanes;
  constexpr int kVectors = kBlockKeys / kGroup;
  constexpr int64_t kBlocks = kLanes / kGroup;  // in one vector
  for (int64_t key = 0; key < num_keys; key += kBlocks * kBlockKeys) {
    F32 x[kVectors];
    F32 greatest = Broadcast(kMasked);
    for (int64_t i = 0; i < kVectors; ++i) {
      x[i] = Load(s + key + i * kLanes) * scale;
      greatest = Max(x[i], greatest);
    }
    greatest = GroupMax<kGroup>(greatest);
    F32 total{};
    for (int i = 0; i < kVectors; ++i) total += Exp2<true>(x[i] - greatest);
    total = GroupAdd<kGroup>(total);
    for (int b = 0; b < kBlocks; ++b) {
      max[key / kBlockKeys + b] = greatest[b * kGroup];
      sum[key / kBlockKeys + b] = total[b * kGroup];
    }
  }
}

template <class Math, int kBlockKeys>
void PageStats(const BlockStatsArgs& args) {
  constexpr int64_t kColUnit = kBlockKeys < kPanel ? kPanel : kBlockKeys;
  alignas(64) float s[kRows * kBlockTokens];
  const float scale = kLog2E / __builtin_sqrtf(static_cast<float>(args.head_dim));
  const float* k = reinterpret_cast<const float*>(args.packed_k);
  for (int64_t row = 0; row < args.num_rows; row += kRows) {
    const int64_t limit = args.first_visible + row + 1;  // of row `row`; one more for each below
    const int64_t last_limit = limit + kRows - 1;
    if (last_limit <= 0) continue;
    const int64_t cols = last_limit < kBlockTokens ? RoundUp(last_limit, kColUnit) : kBlockTokens;
    Scores<Math>(args.packed_q + row * args.head_dim / Math::kPair, k, args.head_dim, cols, s);
    for (int r = 0; r < kRows && row + r < args.num_rows; ++r) {
      const int64_t visible = limit + r < cols ? limit + r : cols;
      if (visible < cols) MaskAndMax(s + r * kBlockTokens, cols, visible);
      const int64_t at = (row + r) * args.stride;
      RowStats<kBlockKeys>(s + r * kBlockTokens, visible, scale, args.max + at, args.sum + at);
    }
  }
}

template <class Math>
void BlockStats(const BlockStatsArgs& args) {
  switch (args.block_keys) {
    case 8:
      return PageStats<Math, 8>(args);
    case 16:
      return PageStats<Math, 16>(args);
    case 32:
      return PageStats<Math, 32>(args);
    case 128:
      return PageStats<Math, 128>(args);
  }
}

// Base-2 log of a row's sum over its blocks.
inline float RowLogSum(const float* max, const float* sum, int64_t num_blocks) {
  F32 greatest = Broadcast(kMasked);
  const I32 lane = LaneIndex();
  for (int64_t b = 0; b < num_blocks; b += kLanes) {
    const I32 real = lane < static_cast<int32_t>(num_blocks - b) - I32{};
    greatest = Max(real ? Load(max + b) : Broadcast(kMasked), greatest);
  }
  greatest = Broadcast(ReduceMax(greatest));
  F32 total{};
  for (int64_t b = 0; b < num_blocks; b += kLanes) {
    const I32 real = lane < static_cast<int32_t>(num_blocks - b) - I32{};
    const F32 part = Exp2<true>(Load(max + b) - greatest) * Load(sum + b);
    total += real ? part : F32{};
  }
  return greatest[0] + __builtin_log2f(ReduceAdd(total));
}

void ReduceRows(const ReduceArgs& args) {
  for (int64_t b = 0; b < args.stride; b += kLanes) {
    Store(Broadcast(kMasked), args.log_max + b);
    Store(F32{}, args.mass + b);
  }
  const float share = 1.0f / static_cast<float>(args.num_rows);
  for (int64_t r = 0; r < args.num_rows; ++r) {
    const float* max = args.max + r * args.stride;
    const float* sum = args.sum + r * args.stride;
    const F32 log_sum = Broadcast(RowLogSum(max, sum, args.num_blocks));
    for (int64_t b = 0; b < args.num_blocks; b += kLanes) {
      const F32 x = Load(max + b) - log_sum;
      Store(Max(x, Load(args.log_max + b)), args.log_max + b);
      Store(Load(args.mass + b) + Exp2<true>(x) * Load(sum + b) * share, args.mass + b);
    }
  }
}

template <typename T>
void Pool(const void* heads, int64_t num_heads, int64_t head_stride, int64_t head_dim, void* out) {
  const T* x = static_cast<const T*>(heads);
  T* mean = static_cast<T*>(out);
  const auto divisor = static_cast<float>(num_heads);
  ForLanes(head_dim, [&](int64_t i, int64_t count) {
    F32 sum = LoadAs(x + i, count);
    for (int64_t h = 1; h < num_heads; ++h) sum += LoadAs(x + h * head_stride + i, count);
    StoreAs(sum / divisor, mean + i, count);
  });
}

template <class Math>
int64_t PackedQBytes(int64_t num_rows, int64_t head_dim) {
  return RoundUp(num_rows, kRows) * head_dim / Math::kPair * int64_t{sizeof(float)};
}

template <class Math>
void PackQueryTile(const void* q, int64_t q_stride, int64_t num_rows, int64_t head_dim,
                   float* packed_q) {
  const TileArgs args{.q = q, .q_stride = q_stride, .num_rows = num_rows, .head_dim = head_dim};
  PackQ<Math>(args, packed_q);
}

template <class Math>
constexpr SelectionKernels SelectionKernelsFor() {
  return {Pool<typename Math::Element>, PackedQBytes<Math>, PackQueryTile<Math>, BlockStats<Math>,
          ReduceRows};
}

}  // namespace
}  // namespace headstart::simd
