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

AttentionKernelParams KernelParams(const AttentionParams& params) {
  const HeadShape& heads = params.kv.shape;
  const int64_t end = params.first_position + params.rows;
  AttentionKernelParams kernel{};
  kernel.kept = params.kept;
  kernel.page_table = params.kv.page_table;
  kernel.tile_counter = params.tile_counter;
  kernel.first_row = static_cast<int32_t>(params.first_position / kBlockTokens);
  kernel.query_offset = static_cast<int32_t>(params.first_position % kBlockTokens);
  kernel.num_queries = static_cast<int32_t>(params.rows);
  kernel.out = static_cast<uint4*>(params.out);
  kernel.out_stride16 = params.out_stride / 8;
  kernel.num_rows = static_cast<int32_t>(NumBlocks(end)) - kernel.first_row;
  kernel.num_tiles = static_cast<uint32_t>(int64_t{kernel.num_rows} * heads.num_heads);
  kernel.last_key_block = static_cast<int32_t>(NumBlocks(end)) - 1;
  kernel.tail_tokens = static_cast<int32_t>(end % kBlockTokens);
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
