// Attention kernels over packed pages. Internal linkage, see vec.h.
//
// The unit of work is a group of kRows query rows against one page of kBlockTokens keys: S = Q K^T
// into a small buffer, online softmax (exponent base 2, lazy rescaling) to P, then O += P V. Both
// products run on the same micro-kernel: kRows x kCols registers of accumulators, fed by one 32-bit
// broadcast per row and kCols registers of a packed panel per step. A 32-bit lane is one float, or
// a pair of bf16 along the summed axis.
//
// Packed K of a page and head: [panel of kPanel keys][head_dim / pair][kPanel] lanes.
// Packed V:                    [panel of kPanel dims][kBlockTokens / pair][kPanel] lanes, dims
// padded.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels/base/dtype.h"
#include "kernels/cpu/simd/kernel_table.h"
#include "kernels/cpu/simd/vec.h"

namespace headstart::simd {
namespace {

constexpr int kCols = 2;
constexpr int kPanel = kCols * kLanes;
// As many accumulators as registers allow: 16 of 32 with AVX-512, 8 of 16 elsewhere.
constexpr int kRows = kVecBytes == 64 ? 8 : 4;
constexpr float kMasked = -1e30f;
// A row's maximum is raised only when a logit passes it by this much (in powers of two), so that
// the accumulators are rescaled a few times per row instead of at every page.
constexpr float kMaxSlack = 8.0f;

constexpr int64_t RoundUp(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// How elements of a compute type are multiplied.
struct FloatMath {
  using Element = float;
  static constexpr int kPair = 1;
  static constexpr bool kExactExp = true;
  static F32 MultiplyAdd(F32 a, F32 b, F32 acc) { return a * b + acc; }
  // Lanes of `count` elements of a row of V; there is no second row in a lane.
  static F32 Interleave(const float* row, const float*, int64_t count) {
    return LoadAs(row, count);
  }
  static void StoreP(F32 low, F32 high, float* p) {
    Store(low, p);
    Store(high, p + kLanes);
  }
};

#if defined(__AVX512BF16__)
struct BFloat16Math {
  using Element = BFloat16;
  static constexpr int kPair = 2;
  static constexpr bool kExactExp = false;
  static F32 MultiplyAdd(F32 a, F32 b, F32 acc) {
    return reinterpret_cast<F32>(
        _mm512_dpbf16_ps(reinterpret_cast<__m512>(acc), (__m512bh)a, (__m512bh)b));
  }
  // Lanes of `count` elements of two rows of V; `next` may be null, for zeros.
  static F32 Interleave(const BFloat16* row, const BFloat16* next, int64_t count) {
    const I32 low = reinterpret_cast<I32>(LoadAs(row, count));
    const I32 high = next == nullptr ? I32{} : reinterpret_cast<I32>(LoadAs(next, count));
    return reinterpret_cast<F32>(high | ((low >> 16) & 0xffff));
  }
  static void StoreP(F32 low, F32 high, float* p) {
    const __m512bh pair =
        _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(high), reinterpret_cast<__m512>(low));
    std::memcpy(p, &pair, sizeof(pair));
  }
};
#endif

// acc[r][c] += sum over steps s of a(r, s) * b(s, c): a(r, s) is lane a[r * kRowLanes + s *
// kStepLanes], b(s, :) the kPanel lanes from b + s * kPanel on.
template <class Math, int64_t kRowLanes, int64_t kStepLanes>
inline void MultiplyPanel(const float* a, const float* b, int64_t steps, F32 (&acc)[kRows][kCols]) {
  for (int64_t s = 0; s < steps; ++s) {
    F32 column[kCols];
#pragma GCC unroll 2
    for (int64_t c = 0; c < kCols; ++c) column[c] = Load(b + s * kPanel + c * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const F32 lane = BroadcastBits(a + r * kRowLanes + s * kStepLanes);
#pragma GCC unroll 2
      for (int c = 0; c < kCols; ++c) acc[r][c] = Math::MultiplyAdd(lane, column[c], acc[r][c]);
    }
  }
}

// Working memory of one tile.
template <class Math>
struct TileScratch {
  static constexpr int64_t kTileRows = RoundUp(kBlockTokens, kRows);
  static constexpr int64_t kPLanes = kBlockTokens / Math::kPair;

  float* q;    // [row group][head_dim / kPair][kRows] lanes
  float* s;    // [kRows][kBlockTokens]
  float* p;    // [kRows][kPLanes] lanes
  float* max;  // [kTileRows] unscaled logits
  float* sum;  // [kTileRows][kLanes] partial sums
  float* out;  // [kTileRows][out_cols]
  int64_t out_cols;

  TileScratch(void* memory, int64_t head_dim) : out_cols(RoundUp(head_dim, kPanel)) {
    q = static_cast<float*>(memory);
    s = q + kTileRows * head_dim / Math::kPair;
    p = s + kRows * kBlockTokens;
    max = p + kRows * kPLanes;
    sum = max + kTileRows;
    out = sum + kTileRows * kLanes;
  }
  static int64_t Bytes(int64_t head_dim) {
    const TileScratch layout(nullptr, head_dim);
    return static_cast<int64_t>(
        reinterpret_cast<uintptr_t>(layout.out + kTileRows * layout.out_cols));
  }
};

template <class Math>
int64_t PackedPageBytes(int64_t head_dim) {
  return kBlockTokens * RoundUp(head_dim, kPanel) * int64_t{sizeof(typename Math::Element)};
}

// Transposes rows of 32-bit lanes, in squares of kLanes: column j of the rows [i, i + kLanes) goes
// to write(i, j, register). Rows from num_rows on count as zero. num_lanes: multiple of kLanes / 2.
template <typename Write>
inline void TransposeRows(const char* data, int64_t stride_bytes, int64_t num_rows,
                          int64_t num_lanes, const Write& write) {
  for (int64_t i = 0; i < num_rows; i += kLanes) {
    for (int64_t j = 0; j < num_lanes; j += kLanes) {
      const int64_t count = num_lanes - j < kLanes ? num_lanes - j : kLanes;
      F32 square[kLanes];
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) {
        const char* row = data + (i + r) * stride_bytes + j * 4;
        square[r] = i + r < num_rows ? LoadAs(reinterpret_cast<const float*>(row), count) : F32{};
      }
      Transpose(square);
      for (int64_t c = 0; c < count; ++c) write(i, j + c, square[c]);
    }
  }
}

template <class Math>
void PackK(const void* page, int64_t num_tokens, int64_t head_dim, char* packed) {
  const int64_t steps = head_dim / Math::kPair;
  float* out = reinterpret_cast<float*>(packed);
  if (num_tokens < kBlockTokens) std::memset(packed, 0, kBlockTokens * steps * 4);
  TransposeRows(static_cast<const char*>(page), steps * 4, num_tokens, steps,
                [&](int64_t key, int64_t s, F32 lanes) {
                  Store(lanes, out + key / kPanel * steps * kPanel + s * kPanel + key % kPanel);
                });
}

template <class Math>
void PackV(const void* page, int64_t num_tokens, int64_t head_dim, char* packed) {
  using Element = typename Math::Element;
  constexpr int64_t kSteps = kBlockTokens / Math::kPair;
  const Element* rows = static_cast<const Element*>(page);
  float* out = reinterpret_cast<float*>(packed);
  if (num_tokens < kBlockTokens || head_dim % kPanel != 0) {
    std::memset(packed, 0, PackedPageBytes<Math>(head_dim));
  }
  for (int64_t token = 0; token < num_tokens; token += Math::kPair) {
    const Element* row = rows + token * head_dim;
    const Element* next = token + 1 < num_tokens ? row + head_dim : nullptr;
    float* panel_row = out + token / Math::kPair * kPanel;
    ForLanes(head_dim, [&](int64_t i, int64_t count) {
      Store(Math::Interleave(row + i, next ? next + i : nullptr, count),
            panel_row + i / kPanel * kSteps * kPanel + i % kPanel);
    });
  }
}

// Brings the query rows to [row group][step][row]; rows from num_rows on are zero.
template <class Math>
void PackQ(const TileArgs& args, float* q) {
  const int64_t steps = args.head_dim / Math::kPair;
  const int64_t stride_bytes = args.q_stride * int64_t{sizeof(typename Math::Element)};
  TransposeRows(static_cast<const char*>(args.q), stride_bytes, args.num_rows, steps,
                [&](int64_t row, int64_t s, F32 lanes) {
                  for (int64_t r = 0; r < kLanes && row + r < args.num_rows; r += kRows) {
                    std::memcpy(q + ((row + r) / kRows * steps + s) * kRows,
                                reinterpret_cast<const char*>(&lanes) + r * 4,
                                sizeof(float) * kRows);
                  }
                });
}

// S of one row group against the first `cols` keys of a page (a multiple of kPanel).
template <class Math>
void Scores(const float* q, const float* packed_k, int64_t head_dim, int64_t cols, float* s) {
  const int64_t steps = head_dim / Math::kPair;
  for (int64_t key = 0; key < cols; key += kPanel) {
    F32 acc[kRows][kCols] = {};
    MultiplyPanel<Math, 1, kRows>(q, packed_k + key * steps, steps, acc);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
      for (int64_t c = 0; c < kCols; ++c) {
        Store(acc[r][c], s + r * kBlockTokens + key + c * kLanes);
      }
    }
  }
}

// Replaces S by kMasked from column `limit` on; returns the greatest of each lane.
inline F32 MaskAndMax(float* s, int64_t cols, int64_t limit) {
  F32 greatest = Broadcast(kMasked);
  const I32 lane = LaneIndex();
  for (int64_t key = 0; key < cols; key += kLanes) {
    F32 x = Load(s + key);
    if (key + kLanes > limit) {
      const I32 visible = lane < static_cast<int32_t>(limit - key) - I32{};
      x = visible ? x : Broadcast(kMasked);
      Store(x, s + key);
    }
    greatest = Max(x, greatest);
  }
  return greatest;
}

// Raises a row's maximum to the greatest lane and brings its sum and output to the new base.
template <class Math>
__attribute__((noinline)) void RaiseMax(F32 greatest, float scale, TileScratch<Math>& t,
                                        int64_t row) {
  const float raised = ReduceMax(greatest);
  const float factor = Exp2Scalar((t.max[row] - raised) * scale);
  t.max[row] = raised;
  float* sum = t.sum + row * kLanes;
  Store(Load(sum) * factor, sum);
  float* out = t.out + row * t.out_cols;
  for (int64_t i = 0; i < t.out_cols; i += kLanes) Store(Load(out + i) * factor, out + i);
}

// One row of online softmax: S[0, cols) to P, with the row's maximum, sum and output kept up to
// date. Columns from `limit` on are not seen.
template <class Math>
inline void SoftmaxRow(float* s, int64_t cols, int64_t limit, float scale, TileScratch<Math>& t,
                       int64_t row, float* p) {
  const F32 greatest = MaskAndMax(s, cols, limit);
  if (AnyGreater(greatest, Broadcast(t.max[row] + kMaxSlack / scale))) {
    RaiseMax(greatest, scale, t, row);
  }
  const F32 bias = Broadcast(t.max[row] * scale);
  F32 total = Load(t.sum + row * kLanes);
#pragma GCC unroll 4
  for (int64_t key = 0; key < cols; key += kPanel) {
    const F32 low = Exp2<Math::kExactExp>(Load(s + key) * scale - bias);
    const F32 high = Exp2<Math::kExactExp>(Load(s + key + kLanes) * scale - bias);
    total += low + high;
    Math::StoreP(low, high, p + key / Math::kPair);
  }
  Store(total, t.sum + row * kLanes);
}

template <class Math>
void SoftmaxRows(int64_t cols, int64_t limit, float scale, TileScratch<Math>& t, int64_t row) {
  constexpr int64_t kPLanes = TileScratch<Math>::kPLanes;
  // The common case with constant bounds: no masks, all loops unrolled.
  if (limit >= kBlockTokens) {
    for (int r = 0; r < kRows; ++r) {
      SoftmaxRow<Math>(t.s + r * kBlockTokens, kBlockTokens, kBlockTokens, scale, t, row + r,
                       t.p + r * kPLanes);
    }
  } else {
    for (int r = 0; r < kRows; ++r) {
      SoftmaxRow<Math>(t.s + r * kBlockTokens, cols, limit + r, scale, t, row + r,
                       t.p + r * kPLanes);
    }
  }
}

// O += P V over the first `cols` keys.
template <class Math>
void AddValues(const float* p, const float* packed_v, int64_t cols, float* out, int64_t out_cols) {
  constexpr int64_t kPLanes = TileScratch<Math>::kPLanes;
  for (int64_t i = 0; i < out_cols; i += kPanel) {
    F32 acc[kRows][kCols];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
      for (int64_t c = 0; c < kCols; ++c) acc[r][c] = Load(out + r * out_cols + i + c * kLanes);
    }
    MultiplyPanel<Math, kPLanes, 1>(p, packed_v + i * kPLanes, cols / Math::kPair, acc);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
      for (int64_t c = 0; c < kCols; ++c) Store(acc[r][c], out + r * out_cols + i + c * kLanes);
    }
  }
}

template <class Math>
void WriteRows(const TileArgs& args, const TileScratch<Math>& t) {
  using Element = typename Math::Element;
  for (int64_t r = 0; r < args.num_rows; ++r) {
    const float inverse = 1.0f / ReduceAdd(Load(t.sum + r * kLanes));
    const float* row = t.out + r * t.out_cols;
    Element* out = static_cast<Element*>(args.out) + r * args.out_stride;
    ForLanes(args.head_dim,
             [&](int64_t i, int64_t count) { StoreAs(Load(row + i) * inverse, out + i, count); });
  }
}

template <class Math>
void AttendPage(const TileArgs& args, int64_t block, float scale, TileScratch<Math>& t) {
  const float* k = reinterpret_cast<const float*>(args.packed_k + block * args.page_stride_bytes);
  const float* v = reinterpret_cast<const float*>(args.packed_v + block * args.page_stride_bytes);
  for (int64_t row = 0; row < args.num_rows; row += kRows) {
    // Keys of this page that row `row` may see; each row below sees one more.
    const int64_t limit = args.first_position + row + 1 - block * kBlockTokens;
    const int64_t last_limit = limit + kRows - 1;
    if (last_limit <= 0) continue;
    const int64_t cols = last_limit < kBlockTokens ? RoundUp(last_limit, kPanel) : kBlockTokens;
    Scores<Math>(t.q + row * args.head_dim / Math::kPair, k, args.head_dim, cols, t.s);
    SoftmaxRows<Math>(cols, limit, scale, t, row);
    AddValues<Math>(t.p, v, cols, t.out + row * t.out_cols, t.out_cols);
  }
}

template <class Math>
void AttentionTile(const TileArgs& args) {
  TileScratch<Math> t(args.scratch, args.head_dim);
  const float scale = kLog2E / __builtin_sqrtf(static_cast<float>(args.head_dim));
  const int64_t rows = RoundUp(args.num_rows, kRows);
  PackQ<Math>(args, t.q);
  for (int64_t r = 0; r < rows; ++r) t.max[r] = kMasked;
  std::memset(t.sum, 0, rows * kLanes * sizeof(float));
  std::memset(t.out, 0, rows * t.out_cols * sizeof(float));
  for (int64_t i = 0; i < args.num_blocks; ++i) {
    AttendPage<Math>(args, args.blocks == nullptr ? i : args.blocks[i], scale, t);
  }
  WriteRows<Math>(args, t);
}

}  // namespace
}  // namespace headstart::simd
