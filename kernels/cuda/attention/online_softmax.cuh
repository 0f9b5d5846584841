// The running softmax of a 64 x 128 tile of logits, in the registers of one warpgroup (layout:
// device/wgmma.cuh).
#pragma once

#include "kernels/cuda/device/numeric.cuh"

namespace headstart::cuda {

// Rows r and r + 8 of a thread: running maximum times the scale (log2 units), and this thread's
// part of the sum.
struct RowState {
  float max0, max1;
  float sum0, sum1;
};

// s := s * scale - maximum.
__device__ __forceinline__ void Shift(float (&s)[64], const RowState& rows, float scale) {
#pragma unroll
  for (int j = 0; j < 16; ++j) {
    s[4 * j] = fmaf(s[4 * j], scale, -rows.max0);
    s[4 * j + 1] = fmaf(s[4 * j + 1], scale, -rows.max0);
    s[4 * j + 2] = fmaf(s[4 * j + 2], scale, -rows.max1);
    s[4 * j + 3] = fmaf(s[4 * j + 3], scale, -rows.max1);
  }
}

// Maxima of the two rows over this thread's columns.
__device__ __forceinline__ float2 RowMaxima(const float (&s)[64]) {
  float a0 = s[0], a1 = s[2], b0 = s[1], b1 = s[3];
#pragma unroll
  for (int j = 1; j < 16; ++j) {
    a0 = fmaxf(a0, s[4 * j]);
    b0 = fmaxf(b0, s[4 * j + 1]);
    a1 = fmaxf(a1, s[4 * j + 2]);
    b1 = fmaxf(b1, s[4 * j + 3]);
  }
  return {fmaxf(a0, b0), fmaxf(a1, b1)};
}

// s := 2^s, added to the sums, for the column groups [kFrom, kTo) of 16. kPolynomial of every 8
// groups avoid the special-function unit.
template <int kPolynomial, int kFrom = 0, int kTo = 16>
__device__ __forceinline__ void Exponentiate(float (&s)[64], RowState& rows) {
  float a0 = 0.0f, a1 = 0.0f, b0 = 0.0f, b1 = 0.0f;
#pragma unroll
  for (int j = kFrom; j < kTo; ++j) {
    const bool polynomial = kPolynomial > 0 && (j % 8) * kPolynomial % 8 >= 8 - kPolynomial;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      s[4 * j + e] = polynomial ? Exp2Polynomial(s[4 * j + e]) : Exp2Approx(s[4 * j + e]);
    }
    a0 += s[4 * j];
    a1 += s[4 * j + 1];
    b0 += s[4 * j + 2];
    b1 += s[4 * j + 3];
  }
  rows.sum0 += a0 + a1;
  rows.sum1 += b0 + b1;
}

// Causal mask of a diagonal tile: row and first_col are this thread's first row and column, in the
// tile's coordinates.
__device__ __forceinline__ void MaskAboveDiagonal(float (&s)[64], int row, int first_col) {
#pragma unroll
  for (int j = 0; j < 16; ++j) {
    const int col = first_col + 8 * j;
    if (col > row) s[4 * j] = -INFINITY;
    if (col + 1 > row) s[4 * j + 1] = -INFINITY;
    if (col > row + 8) s[4 * j + 2] = -INFINITY;
    if (col + 1 > row + 8) s[4 * j + 3] = -INFINITY;
  }
}

// First block of a tile: exact maxima, probabilities and sums.
__device__ __forceinline__ void SoftmaxFirst(float (&s)[64], RowState& rows, float scale) {
  const float2 maxima = RowMaxima(s);
  rows = RowState{QuadMax(maxima.x) * scale, QuadMax(maxima.y) * scale, 0.0f, 0.0f};
  Shift(s, rows, scale);
  Exponentiate<0>(s, rows);
}

// By how much the output so far must be scaled.
struct Rescale {
  bool any;  // the same in all lanes of a warp
  float factor0, factor1;
};

// Later blocks: leaves log2 of the probabilities in s. The maximum moves only when a row outgrew it
// by more than `threshold` (log2 units), which is rare; positive floats compare like integers and
// negative ones are negative integers, so the test is a chain of 3-input integer maxima and a vote.
__device__ __forceinline__ Rescale SoftmaxNext(float (&s)[64], RowState& rows, float scale,
                                               float threshold) {
  Shift(s, rows, scale);
  int even0 = 0, odd0 = 0, even1 = 0, odd1 = 0;
#pragma unroll
  for (int j = 0; j < 16; j += 2) {
    even0 = __vimax3_s32(even0, __float_as_int(s[4 * j]), __float_as_int(s[4 * j + 1]));
    even1 = __vimax3_s32(even1, __float_as_int(s[4 * j + 2]), __float_as_int(s[4 * j + 3]));
    odd0 = __vimax3_s32(odd0, __float_as_int(s[4 * j + 4]), __float_as_int(s[4 * j + 5]));
    odd1 = __vimax3_s32(odd1, __float_as_int(s[4 * j + 6]), __float_as_int(s[4 * j + 7]));
  }
  const int growth0 = max(even0, odd0), growth1 = max(even1, odd1);
  Rescale rescale{false, 1.0f, 1.0f};
  rescale.any = __any_sync(~0u, max(growth0, growth1) > __float_as_int(threshold));
  if (rescale.any) {
    // Each row for itself: what its neighbours need must not change its rounding.
    const int row0 = QuadMax(growth0), row1 = QuadMax(growth1);
    const float grow0 = row0 > __float_as_int(threshold) ? __int_as_float(row0) : 0.0f;
    const float grow1 = row1 > __float_as_int(threshold) ? __int_as_float(row1) : 0.0f;
    rescale.factor0 = Exp2Approx(-grow0);
    rescale.factor1 = Exp2Approx(-grow1);
    rows = RowState{rows.max0 + grow0, rows.max1 + grow1, rows.sum0 * rescale.factor0,
                    rows.sum1 * rescale.factor1};
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      s[4 * j] -= grow0;
      s[4 * j + 1] -= grow0;
      s[4 * j + 2] -= grow1;
      s[4 * j + 3] -= grow1;
    }
  }
  return rescale;
}

// Probabilities as the A operand of the second product: its k-step kk uses p[4 kk] to p[4 kk + 3].
__device__ __forceinline__ void PackProbabilities(uint32_t (&p)[32], const float (&s)[64]) {
#pragma unroll
  for (int j = 0; j < 16; ++j) {
    p[2 * j] = PackBf16(s[4 * j], s[4 * j + 1]);
    p[2 * j + 1] = PackBf16(s[4 * j + 2], s[4 * j + 3]);
  }
}

}  // namespace headstart::cuda
