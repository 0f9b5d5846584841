#include <algorithm>
#include <array>
#include <cmath>

#include "kernels/cuda/attention/block_sparse_attn.cuh"
#include "kernels/cuda/device/kv_tensor_map.h"
#include "kernels/cuda/device/tensor_map.h"

namespace headstart::cuda {
namespace {

// Heads of a [tokens, H d] matrix as {64, tokens, d / 64, H}: one box is one panel of a tile.
TensorShape HeadPanels(const void* data, int64_t rows, int64_t row_stride, const HeadShape& heads) {
  return {data, {64, rows, heads.head_dim / 64, heads.num_heads}, {row_stride, 64, heads.head_dim}};
}

SequenceTiles MakeSequence(const AttendedSequence& sequence, int32_t num_heads,
                           uint32_t first_tile) {
  const SequenceRows& rows = sequence.rows;
  const int64_t end = rows.first_position + rows.num_rows;
  SequenceTiles tiles{};
  tiles.kept = sequence.kept;
  tiles.page_table = rows.page_table;
  tiles.first_row = static_cast<int32_t>(rows.first_position / kBlockTokens);
  tiles.query_offset = static_cast<int32_t>(rows.first_position % kBlockTokens);
  tiles.end_query = tiles.query_offset + static_cast<int32_t>(rows.num_rows);
  tiles.first_token = static_cast<int32_t>(rows.first_row) - tiles.query_offset;
  tiles.num_rows = static_cast<int32_t>(NumBlocks(end)) - tiles.first_row;
  tiles.end_tile = first_tile + static_cast<uint32_t>(tiles.num_rows * num_heads);
  tiles.tail_tokens = static_cast<int32_t>(end % kBlockTokens);
  tiles.counts = sequence.counts;
  // Of a head: first_row + 1 … first_row + num_rows.
  tiles.causal_blocks = static_cast<uint64_t>(num_heads) * tiles.num_rows *
                        (2 * tiles.first_row + tiles.num_rows + 1) / 2;
  return tiles;
}

AttentionKernelParams KernelParams(const AttentionParams& params) {
  const HeadShape& heads = params.kv.shape;
  // The longest sequences first, whose tiles are the longest: what is left at the end is short.
  std::array<AttendedSequence, kMaxSequences> sequences;
  const auto end = std::copy_n(params.sequences, params.num_sequences, sequences.begin());
  std::stable_sort(sequences.begin(), end, [](const auto& a, const auto& b) {
    return a.rows.first_position + a.rows.num_rows > b.rows.first_position + b.rows.num_rows;
  });
  AttentionKernelParams kernel{};
  for (int i = 0; i < params.num_sequences; ++i) {
    kernel.sequences[i] = MakeSequence(sequences[i], heads.num_heads, kernel.num_tiles);
    kernel.num_tiles = kernel.sequences[i].end_tile;
  }
  kernel.tile_counter = params.tile_counter;
  kernel.out = static_cast<uint4*>(params.out);
  kernel.out_stride16 = params.out_stride / 8;
  kernel.group_size = heads.group_size();
  kernel.scale_log2 = kLog2E / std::sqrt(static_cast<float>(heads.head_dim));
  return kernel;
}

template <int kHeadDim>
cudaError_t Launch(const AttentionParams& params, cudaStream_t stream) {
  const HeadShape& heads = params.kv.shape;
  CUtensorMap q_map, k_map, v_map, out_map;
  const TensorShape q = HeadPanels(params.q, params.rows, params.q_stride, heads);
  const TensorShape out = HeadPanels(params.out, params.rows, params.out_stride, heads);
  cudaError_t error = MakeTensorMap(q, kBlock, &q_map);
  if (error == cudaSuccess) error = MakeTensorMap(out, kBlock, &out_map);
  if (error == cudaSuccess)
    error = MakeTensorMap(KvPlanes(params.kv, KvPlane::kKeys), kBlock, &k_map);
  if (error == cudaSuccess)
    error = MakeTensorMap(KvPlanes(params.kv, KvPlane::kValues), kBlock, &v_map);
  if (error != cudaSuccess) return error;
  constexpr int kSharedBytes = sizeof(AttentionShared<kHeadDim>) + 1024;
  static const cudaError_t configured = cudaFuncSetAttribute(
      AttentionKernel<kHeadDim>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (configured != cudaSuccess) return configured;
  AttentionKernel<kHeadDim><<<params.num_sms, kAttentionThreads, kSharedBytes, stream>>>(
      q_map, k_map, v_map, out_map, KernelParams(params));
  return cudaGetLastError();
}

}  // namespace

cudaError_t LaunchAttention(const AttentionParams& params, cudaStream_t stream) {
  if (params.num_sequences < 1 || params.num_sequences > kMaxSequences) {
    return cudaErrorInvalidValue;
  }
  switch (params.kv.shape.head_dim) {
    case 64:
      return Launch<64>(params, stream);
    case 128:
      return Launch<128>(params, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace headstart::cuda
