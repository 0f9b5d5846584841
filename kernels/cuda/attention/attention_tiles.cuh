// Tiles of attention work on their way through a CTA: what the kernel is given, its shared memory,
// the warp that loads tiles and the warp that stores them. See block_sparse_attn.cuh.
#pragma once

#include "kernels/cuda/attention/tile_order.cuh"
#include "kernels/cuda/device/mbarrier.cuh"
#include "kernels/cuda/device/numeric.cuh"
#include "kernels/cuda/device/tma.cuh"
#include "kernels/cuda/launchers.h"

namespace headstart::cuda {

inline constexpr int kBlock = static_cast<int>(kBlockTokens);
inline constexpr uint32_t kPanelBytes = kBlock * 128;  // 128 rows of 64 bf16
inline constexpr int kAttentionThreads = 384;
inline constexpr int kConsumerWarps = 8;
// O is rescaled only when a row's maximum outgrew the one in use by more than this (log2 units).
inline constexpr float kRescaleThreshold = 8.0f;

// A sequence as the kernel sees it. Its tiles are query blocks, aligned to its key blocks.
struct SequenceTiles {
  KeptBlocks kept;
  const int32_t* page_table;
  uint32_t end_tile;     // of the launch's tiles; they begin where the sequence before ends
  int32_t num_rows;      // query blocks
  int32_t first_row;     // key block of the first query block
  int32_t query_offset;  // rows of the first tile that lie before the first query
  int32_t end_query;     // rows from the first tile's first to the last query, included
  int32_t first_token;   // row of q of the first tile's first row; may be negative
  int32_t tail_tokens;   // tokens in the last key block, 0 when it is full
  BlockCounts* counts;   // or null; gets causal_blocks
  uint64_t causal_blocks;
};

struct AttentionKernelParams {
  SequenceTiles sequences[kMaxSequences];
  uint32_t* tile_counter;
  uint32_t num_tiles;
  uint4* out;            // for StoreRows
  int64_t out_stride16;  // of its rows, in 16 bytes
  int32_t group_size;
  float scale_log2;  // softmax scale * log2(e)
};

// What differs by head dimension, measured: the pipeline depth that fits, how many of the last
// products are issued after the hand-over to the other warpgroup, the share (of 8) of exponentials
// off the special-function unit, and the column groups (of 16) exponentiated while P V still runs.
template <int kHeadDim>
struct AttentionTuning;
template <>
struct AttentionTuning<128> {
  static constexpr int kStages = 2, kIssuedLate = 0, kPolynomial = 0, kGroupsBeforeWait = 4;
};
template <>
struct AttentionTuning<64> {
  static constexpr int kStages = 4, kIssuedLate = 2, kPolynomial = 2, kGroupsBeforeWait = 4;
};

struct Tile {
  int32_t count;        // kept blocks; 0: no more work
  int32_t tail_tokens;  // tokens in its diagonal block, 0 when that is full
  int32_t head;
  int32_t token;       // row of q and out of its first row
  int32_t begin, end;  // its rows that are queries
};

// What only the loading warp needs of it besides.
struct TileSource {
  const int32_t* page_table;
  const uint16_t* list;  // of its kept blocks; null: all, from the diagonal down
};

template <int kHeadDim>
struct alignas(1024) AttentionShared {
  static constexpr int kStages = AttentionTuning<kHeadDim>::kStages;
  Bf16 q[2][kBlock * kHeadDim];  // 64-column panels; double-buffered over tiles
  Bf16 k[kStages][kBlock * kHeadDim];
  Bf16 v[kStages][kBlock * kHeadDim];
  uint64_t q_full[2], q_empty[2], o_full[2];
  uint64_t k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
  Tile tile[2];  // the tile whose Q is in q[slot]
};
static_assert(sizeof(AttentionShared<128>) + 1024 <= 232448 &&
              sizeof(AttentionShared<64>) + 1024 <= 232448);

// Which tile an index below num_tiles stands for.
struct TilePlace {
  const SequenceTiles& sequence;
  TileId id;
};
__device__ __forceinline__ TilePlace PlaceOf(const AttentionKernelParams& params, uint32_t index) {
  uint32_t first_tile = 0;
  int s = 0;
  while (index >= params.sequences[s].end_tile) first_tile = params.sequences[s++].end_tile;
  const SequenceTiles& sequence = params.sequences[s];
  return {sequence, TileAt(index - first_tile, sequence.num_rows, params.group_size)};
}

// Kept blocks of a tile; 0 past the last one.
__device__ __forceinline__ int LoadCount(const AttentionKernelParams& params, uint32_t index) {
  if (index >= params.num_tiles) return 0;
  const auto [sequence, id] = PlaceOf(params, index);
  if (sequence.kept.lists == nullptr) return sequence.first_row + id.row + 1;
  return __ldg(sequence.kept.counts + id.head * sequence.num_rows + id.row);
}

__device__ __forceinline__ Tile DescribeTile(const AttentionKernelParams& params, uint32_t index,
                                             int count, TileSource& source) {
  if (count == 0) return {};
  const auto [sequence, id] = PlaceOf(params, index);
  source = {sequence.page_table, nullptr};
  if (sequence.kept.lists != nullptr) {
    // Blocks of the rows before: the mean of first_row + 1 … first_row + row, times row.
    const uint32_t rows_before = id.row;
    const uint32_t offset = rows_before * (2 * sequence.first_row + rows_before + 1) / 2;
    source.list = sequence.kept.lists + id.head * sequence.kept.head_stride + offset;
  }
  return {count,
          id.row == sequence.num_rows - 1 ? sequence.tail_tokens : 0,
          id.head,
          sequence.first_token + id.row * kBlock,
          id.row == 0 ? sequence.query_offset : 0,
          min(kBlock, sequence.end_query - id.row * kBlock)};
}

// Page of the i-th of `count` kept blocks, 0 past the end.
__device__ __forceinline__ int LoadPage(const TileSource& source, int count, int i) {
  if (i >= count) return 0;
  const int block = source.list == nullptr ? count - 1 - i : __ldg(source.list + i);
  return __ldg(source.page_table + block);
}

// The loading warp. Each lane holds the page of one of 32 consecutive kept blocks; lane 0 issues.
template <int kHeadDim>
class TileLoader {
 public:
  __device__ __forceinline__ TileLoader(AttentionShared<kHeadDim>& shared, const CUtensorMap& q_map,
                                        const CUtensorMap& k_map, const CUtensorMap& v_map,
                                        const AttentionKernelParams& params)
      : shared_(shared), q_map_(q_map), k_map_(k_map), v_map_(v_map), params_(params) {}

  __device__ __forceinline__ void Run() {
    uint32_t index = __shfl_sync(~0u, lane_ == 0 ? Claim() : 0, 0);
    int count = LoadCount(params_, index);
    int v_page = -1, v_head = 0;  // V runs one block behind K
    for (uint32_t w = 0;; ++w) {
      TileSource source{};
      const Tile tile = DescribeTile(params_, index, count, source);
      int page = LoadPage(source, count, lane_);
      AnnounceTile(tile, w);
      if (count == 0) break;
      const int kv_head = tile.head / params_.group_size;
      const int claim_at = max(count - 6, 0),
                load_at = max(count - 3, 0);  // the next tile, a little ahead
      int next_count = 0;
      for (int i = 0; i < count; ++i) {
        if (i == claim_at && lane_ == 0) index = Claim();
        if (i == load_at) {
          index = __shfl_sync(~0u, index, 0);
          next_count = LoadCount(params_, index);
        }
        if (i != 0 && i % 32 == 0) page = LoadPage(source, count, i + lane_);
        const int k_page = __shfl_sync(~0u, page, i % 32);
        if (lane_ == 0) {
          Issue(shared_.k, shared_.k_full, shared_.k_empty, k_map_, k_step_++, k_page, kv_head);
          if (v_page >= 0)
            Issue(shared_.v, shared_.v_full, shared_.v_empty, v_map_, v_step_++, v_page, v_head);
        }
        v_page = k_page;
        v_head = kv_head;
      }
      count = next_count;
    }
    if (lane_ == 0 && v_page >= 0)
      Issue(shared_.v, shared_.v_full, shared_.v_empty, v_map_, v_step_++, v_page, v_head);
  }

 private:
  static constexpr int kStages = AttentionShared<kHeadDim>::kStages;
  static constexpr uint32_t kTileBytes = kBlock * kHeadDim * 2;

  // Every CTA draws exactly one index past the end; whoever draws the last one resets the counter
  // for the next launch.
  __device__ __forceinline__ uint32_t Claim() {
    const uint32_t index = atomicAdd(params_.tile_counter, 1u);
    if (index == params_.num_tiles + gridDim.x - 1) *params_.tile_counter = 0;
    return index;
  }

  // Hands the tile to the other warps and loads its Q.
  __device__ __forceinline__ void AnnounceTile(const Tile& tile, uint32_t w) {
    const uint32_t slot = RingSlot<2>(w);
    BarrierWait(&shared_.q_empty[slot], RingParity<2>(w) ^ 1);
    if (lane_ != 0) return;
    shared_.tile[slot] = tile;
    if (tile.count == 0) {
      BarrierArrive(&shared_.q_full[slot]);
      return;
    }
    BarrierExpect(&shared_.q_full[slot], kTileBytes);
#pragma unroll
    for (int p = 0; p < kHeadDim / 64; ++p) {
      TmaLoad(&shared_.q[slot][p * kBlock * 64], q_map_, &shared_.q_full[slot],
              {0, tile.token, p, tile.head}, once_);
    }
  }

  __device__ __forceinline__ void Issue(Bf16 (&buffers)[kStages][kBlock * kHeadDim], uint64_t* full,
                                        uint64_t* empty, const CUtensorMap& map, uint32_t step,
                                        int page, int kv_head) {
    const uint32_t slot = RingSlot<kStages>(step);
    BarrierWait(&empty[slot], RingParity<kStages>(step) ^ 1);
    BarrierExpect(&full[slot], kTileBytes);
#pragma unroll
    for (int p = 0; p < kHeadDim / 64; ++p) {
      TmaLoad(&buffers[slot][p * kBlock * 64], map, &full[slot], {p * 64, 0, kv_head, page}, keep_);
    }
  }

  AttentionShared<kHeadDim>& shared_;
  const CUtensorMap& q_map_;
  const CUtensorMap& k_map_;
  const CUtensorMap& v_map_;
  const AttentionKernelParams& params_;
  const int lane_ = threadIdx.x % 32;
  const uint64_t keep_ = PolicyKeep(), once_ = PolicyOnce();
  uint32_t k_step_ = 0, v_step_ = 0;
};

// Copies the staged rows [begin, end) of a tile to the output with ordinary stores: the box of a
// TMA store is the whole tile, whose other rows may lie before the tensor or be another sequence's.
// One warp.
template <int kHeadDim>
__device__ __forceinline__ void StoreRows(const Bf16* staged, const Tile& tile,
                                          const AttentionKernelParams& params) {
  constexpr int kChunks = kHeadDim / 8;  // of 16 bytes, in a row: one a lane
  const int chunk = threadIdx.x % 32;
  if (chunk >= kChunks) return;
  const auto* panel = reinterpret_cast<const uint4*>(staged + chunk / 8 * kBlock * 64);
  uint4* out =
      params.out + (tile.token + tile.begin) * params.out_stride16 + tile.head * kChunks + chunk;
#pragma unroll 1
  for (int row = tile.begin; row < tile.end; ++row, out += params.out_stride16) {
    *out = panel[row * 8 + ((chunk % 8) ^ (row % 8))];
  }
}

// The storing warp.
template <int kHeadDim>
__device__ __forceinline__ void StoreTiles(AttentionShared<kHeadDim>& shared,
                                           const CUtensorMap& out_map,
                                           const AttentionKernelParams& params) {
  const int lane = threadIdx.x % 32;
  for (uint32_t w = 0;; ++w) {
    const uint32_t slot = RingSlot<2>(w), parity = RingParity<2>(w);
    BarrierWait(&shared.q_full[slot], parity);
    const Tile tile = shared.tile[slot];
    if (tile.count == 0) break;
    BarrierWait(&shared.o_full[slot], parity);
    if (tile.end - tile.begin != kBlock) {
      StoreRows<kHeadDim>(shared.q[slot], tile, params);
      __syncwarp();
    } else if (lane == 0) {
#pragma unroll
      for (int p = 0; p < kHeadDim / 64; ++p) {
        TmaStore(out_map, &shared.q[slot][p * kBlock * 64], {0, tile.token, p, tile.head});
      }
      TmaStoreCommit();
      TmaStoreWaitRead();
    }
    if (lane == 0) BarrierArrive(&shared.q_empty[slot]);
    __syncwarp();
  }
  if (lane == 0) TmaStoreWait();
}

// Adds what dense sequences come to. One thread of the launch.
__device__ __forceinline__ void CountBlocks(const AttentionKernelParams& params) {
#pragma unroll 1
  for (int s = 0; s < kMaxSequences; ++s) {
    const SequenceTiles& sequence = params.sequences[s];
    if (sequence.counts == nullptr) continue;
    sequence.counts->executed_blocks += sequence.causal_blocks;
    sequence.counts->causal_blocks += sequence.causal_blocks;
  }
}

}  // namespace headstart::cuda
