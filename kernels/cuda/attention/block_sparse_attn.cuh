// Block-sparse causal GQA attention, forward, for sm_90a: bf16 in and out, fp32 accumulation.
//
// One CTA per multiprocessor takes tiles (TileAt) from a counter. Its three warpgroups:
//   0     warp 0 loads: takes tiles, issues all TMA loads; warp 1 stores the finished tiles; warp 2
//         counts the launch's blocks.
//   1, 2  compute, 64 query rows each. A step issues S = Q K(i+1)^T and O += P(i) V(i) back to back
//         and does the softmax of S while the other warpgroup's products run (they hand over
//         through two named barriers). The pipeline does not end with a tile: the next one's
//         diagonal block takes the place of K(i+1).
//
// Invariants:
//   * K runs one block ahead of V, in the loader's order and in the consumers' (`step`).
//   * Empty-barriers take one arrival a warp, not a warpgroup: nothing else keeps the four warps of
//     a warpgroup together, and one that lags can miss a phase and wait for ever.
//   * O is staged in its tile's own Q buffer; the storer hands that back when its TMA store has
//     read it.
//   * Tiles are aligned to key blocks also when the first query is not: rows that are no queries of
//     the tile's sequence are computed and never stored, so only a tile's first block, the diagonal
//     one, is ever masked. No row's result depends on another row.
#pragma once

#include "kernels/cuda/attention/attention_tiles.cuh"
#include "kernels/cuda/attention/online_softmax.cuh"
#include "kernels/cuda/device/wgmma.cuh"

namespace headstart::cuda {

// S = Q K^T, [64, 128] over kHeadDim; both operands in panels of kARows and 128 rows.
template <int kHeadDim, int kARows = kBlock>
__device__ __forceinline__ void IssueQk(float (&s)[64], uint32_t q, uint32_t k) {
#pragma unroll
  for (int kk = 0; kk < kHeadDim / 16; ++kk) {
    const uint32_t within = (kk % 4) * 2;
    WgmmaM64N128K16(s, Descriptor(q + (kk / 4) * (kARows * 128 >> 4) + within),
                    Descriptor(k + (kk / 4) * (kPanelBytes >> 4) + within), kk > 0);
  }
}

// O (+)= P V over the k-steps [from, to) of 8.
template <int kHeadDim>
__device__ __forceinline__ void IssuePv(float (&o)[kHeadDim / 2], const uint32_t (&p)[32],
                                        uint32_t v, int accumulate, int from, int to) {
#pragma unroll
  for (int kk = from; kk < to; ++kk) {
    if constexpr (kHeadDim == 128) {
      WgmmaM64N128K16(o, &p[4 * kk], Descriptor(v + kk * 128), accumulate | (kk > 0));
    } else {
      WgmmaM64N64K16(o, &p[4 * kk], Descriptor(v + kk * 128), accumulate | (kk > 0));
    }
  }
}

// Normalises O and stages it, swizzled as TMA expects it, in this warpgroup's 64 rows of the tile's
// Q buffer.
template <int kHeadDim>
__device__ __forceinline__ void StageOutput(const float (&o)[kHeadDim / 2], const RowState& rows,
                                            Bf16* q_buffer, uint64_t* o_full, int consumer) {
  const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
  const float inverse0 = 1.0f / QuadSum(rows.sum0), inverse1 = 1.0f / QuadSum(rows.sum1);
  const int row = consumer * 64 + warp * 16 + lane % 16;  // whose 16-byte chunk this lane addresses
  const uint32_t base = SharedAddress(q_buffer) + row * 128;
#pragma unroll
  for (int j = 0; j < kHeadDim / 8; j += 2) {
    const int chunk = j + lane / 16;
    StoreMatrices(base + (chunk / 8) * kPanelBytes + (((chunk % 8) ^ (row % 8)) << 4),
                  PackBf16(o[4 * j] * inverse0, o[4 * j + 1] * inverse0),
                  PackBf16(o[4 * j + 2] * inverse1, o[4 * j + 3] * inverse1),
                  PackBf16(o[4 * j + 4] * inverse0, o[4 * j + 5] * inverse0),
                  PackBf16(o[4 * j + 6] * inverse1, o[4 * j + 7] * inverse1));
  }
  FenceAsyncProxy();
  __syncwarp();
  if (lane == 0) BarrierArrive(o_full);
}

// Zeroes the rows of V past the end of the sequence: their probabilities are 0, but 0 * NaN is NaN.
// Both warpgroups write the same zeros.
template <int kHeadDim>
__device__ __forceinline__ void ZeroValueTail(Bf16* v, int first_row, int consumer) {
  const int chunks = (kBlock - first_row) * 8;  // of 16 bytes, in one panel
  for (int i = threadIdx.x % 128; i < chunks * (kHeadDim / 64); i += 128) {
    Bf16* panel = v + i / chunks * kBlock * 64;
    reinterpret_cast<uint4*>(panel + first_row * 64)[i % chunks] = make_uint4(0, 0, 0, 0);
  }
  FenceAsyncProxy();
  NamedSync(3 + consumer, 128);
}

template <int kHeadDim>
__device__ __forceinline__ void ComputeTiles(AttentionShared<kHeadDim>& shared,
                                             const AttentionKernelParams& params, int consumer) {
  using Tuning = AttentionTuning<kHeadDim>;
  constexpr int kStages = Tuning::kStages;
  // One Q, K or V buffer in units of 16 bytes.
  constexpr uint32_t kTile16 = kBlock * kHeadDim * 2 / 16;
  const int lane = threadIdx.x % 32;
  const int row = consumer * 64 + threadIdx.x % 128 / 32 * 16 + lane / 4, first_col = lane % 4 * 2;
  const uint32_t q_base = DescriptorKMajor(&shared.q[0][consumer * 64 * 64]);
  const uint32_t k_base = DescriptorKMajor(shared.k[0]);
  const uint32_t v_base = DescriptorMnMajor(shared.v[0], kPanelBytes);
  if (consumer == 0) NamedArrive(1, 256);  // the first warpgroup goes first

  float s[64], o[kHeadDim / 2];
  uint32_t p[32];
  RowState rows;
  uint32_t step = 0;     // products Q K^T done, over all tiles; P V runs one behind
  bool k_ready = false;  // K(step) was seen loaded
  const auto wait_k = [&] {
    if (!k_ready) BarrierWait(&shared.k_full[RingSlot<kStages>(step)], RingParity<kStages>(step));
  };
  const auto wait_v = [&] {
    BarrierWait(&shared.v_full[RingSlot<kStages>(step - 1)], RingParity<kStages>(step - 1));
  };
  const auto next_step = [&] {
    ++step;
    k_ready = BarrierTest(&shared.k_full[RingSlot<kStages>(step)], RingParity<kStages>(step));
  };
  // S = Q K(step)^T and O (+)= P V(step - 1); returns with S complete and P V in flight.
  const auto issue_both = [&](uint32_t q, int accumulate) {
    wait_k();
    NamedSync(1 + consumer, 256);
    WgmmaFence();
    Pin(s);
    Pin(o);
    Pin(p);
    IssueQk<kHeadDim>(s, q, k_base + RingSlot<kStages>(step) * kTile16);
    WgmmaCommit();
    wait_v();
    WgmmaFence();
    const uint32_t v = v_base + RingSlot<kStages>(step - 1) * kTile16;
    IssuePv<kHeadDim>(o, p, v, accumulate, 0, 8 - Tuning::kIssuedLate);
    NamedArrive(1 + (consumer ^ 1), 256);
    IssuePv<kHeadDim>(o, p, v, accumulate, 8 - Tuning::kIssuedLate, 8);
    WgmmaCommit();
    WgmmaWait<1>();
    Pin(s);
  };
  const auto finish_pv = [&] {
    WgmmaWait<0>();
    Pin(o);
    Pin(p);
    if (lane == 0) BarrierArrive(&shared.v_empty[RingSlot<kStages>(step - 1)]);
  };
  const auto zero_tail = [&](int tail_tokens) {
    if (tail_tokens == 0) return;
    wait_v();
    ZeroValueTail<kHeadDim>(shared.v[RingSlot<kStages>(step - 1)], tail_tokens, consumer);
  };

  uint32_t w = 0;
  BarrierWait(&shared.q_full[0], 0);
  int tail_tokens = shared.tile[0].tail_tokens;
  // Counts go through a shuffle: only then does the compiler know them to be uniform, and keeps the
  // descriptors of the loop in uniform registers.
  int count = __shfl_sync(~0u, shared.tile[0].count, 0);
  if (count != 0) {  // the first diagonal block: nothing to overlap with
    wait_k();
    WgmmaFence();
    Pin(s);
    IssueQk<kHeadDim>(s, q_base, k_base);
    WgmmaCommit();
    WgmmaWait<0>();
    Pin(s);
    if (lane == 0) BarrierArrive(&shared.k_empty[0]);
    MaskAboveDiagonal(s, row, first_col);
    SoftmaxFirst(s, rows, params.scale_log2);
    PackProbabilities(p, s);
    next_step();
  }
  while (count != 0) {
    const uint32_t slot = RingSlot<2>(w);
    zero_tail(tail_tokens);
#pragma unroll 1
    for (int i = 1; i < count; ++i) {
      issue_both(q_base + slot * kTile16, i > 1);
      const Rescale rescale = SoftmaxNext(s, rows, params.scale_log2, kRescaleThreshold);
      Exponentiate<Tuning::kPolynomial, 0, Tuning::kGroupsBeforeWait>(s, rows);
      // The condition always holds (sums are positive); the false dependency keeps ptxas from
      // moving the wait for P V, which follows, ahead of the exponentials.
      if (lane == 0 && !(rows.sum0 + rows.sum1 < 0.0f)) {
        BarrierArrive(&shared.k_empty[RingSlot<kStages>(step)]);
      }
      finish_pv();
      Exponentiate<Tuning::kPolynomial, Tuning::kGroupsBeforeWait, 16>(s, rows);
      PackProbabilities(p, s);
      if (rescale.any) {
#pragma unroll
        for (int j = 0; j < kHeadDim / 8; ++j) {
          o[4 * j] *= rescale.factor0;
          o[4 * j + 1] *= rescale.factor0;
          o[4 * j + 2] *= rescale.factor1;
          o[4 * j + 3] *= rescale.factor1;
        }
      }
      next_step();
    }
    ++w;
    const uint32_t next_slot = RingSlot<2>(w);
    BarrierWait(&shared.q_full[next_slot], RingParity<2>(w));
    const int next_tail = shared.tile[next_slot].tail_tokens;
    const int next_count = __shfl_sync(~0u, shared.tile[next_slot].count, 0);
    if (next_count != 0) {  // the next tile's diagonal block runs beside this tile's last P V
      issue_both(q_base + next_slot * kTile16, count > 1);
      if (lane == 0) BarrierArrive(&shared.k_empty[RingSlot<kStages>(step)]);
      const RowState finished = rows;
      MaskAboveDiagonal(s, row, first_col);
      SoftmaxFirst(s, rows, params.scale_log2);
      finish_pv();
      PackProbabilities(p, s);
      StageOutput<kHeadDim>(o, finished, shared.q[slot], &shared.o_full[slot], consumer);
      next_step();
    } else {
      wait_v();
      WgmmaFence();
      Pin(o);
      Pin(p);
      IssuePv<kHeadDim>(o, p, v_base + RingSlot<kStages>(step - 1) * kTile16, count > 1, 0, 8);
      WgmmaCommit();
      finish_pv();
      StageOutput<kHeadDim>(o, rows, shared.q[slot], &shared.o_full[slot], consumer);
    }
    tail_tokens = next_tail;
    count = next_count;
  }
}

template <int kHeadDim>
__global__ void __launch_bounds__(kAttentionThreads, 1)
    AttentionKernel(const __grid_constant__ CUtensorMap q_map,
                    const __grid_constant__ CUtensorMap k_map,
                    const __grid_constant__ CUtensorMap v_map,
                    const __grid_constant__ CUtensorMap out_map,
                    const __grid_constant__ AttentionKernelParams params) {
  constexpr int kStages = AttentionShared<kHeadDim>::kStages;
  extern __shared__ uint8_t raw[];
  auto& shared = *reinterpret_cast<AttentionShared<kHeadDim>*>(
      (reinterpret_cast<uintptr_t>(raw) + 1023) & ~uintptr_t{1023});
  const int warpgroup = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 128, 0);
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) {
      BarrierInit(&shared.q_full[i], 1);
      BarrierInit(&shared.q_empty[i], 1);
      BarrierInit(&shared.o_full[i], kConsumerWarps);
    }
    for (int i = 0; i < kStages; ++i) {
      BarrierInit(&shared.k_full[i], 1);
      BarrierInit(&shared.k_empty[i], kConsumerWarps);
      BarrierInit(&shared.v_full[i], 1);
      BarrierInit(&shared.v_empty[i], kConsumerWarps);
    }
    BarrierInitFence();
  }
  __syncthreads();
  if (warpgroup == 0) {
    RegistersShrink<40>();
    if (threadIdx.x < 32) {
      TileLoader<kHeadDim>(shared, q_map, k_map, v_map, params).Run();
    } else if (threadIdx.x < 64) {
      StoreTiles<kHeadDim>(shared, out_map, params);
    } else if (threadIdx.x == 64 && blockIdx.x == 0) {
      CountBlocks(params);
    }
  } else {
    RegistersGrow<232>();
    ComputeTiles<kHeadDim>(shared, params, warpgroup - 1);
  }
}

}  // namespace headstart::cuda
