// The inner loops of block selection, compiled once per instruction set; part of KernelTable.
//
// Steps 1 and 2 of ProxyAttn are one computation on different tokens: the softmax of some query
// rows over all keys before them, reduced block by block to its maximum and its mass. Step 1 runs
// it on every stride-th token, pooled over heads; step 2 on all tokens of the last query block.
// Logits are in powers of two: q . k * log2(e) / sqrt(head_dim).
#pragma once

#include <cstdint>

namespace headstart::simd {

// Rows of one query tile against one packed page of kBlockTokens keys. Row r sees the page's keys
// 0 .. first_visible + r, which may be none or all.
struct BlockStatsArgs {
  const float* packed_q = nullptr;  // from pack_q
  int64_t num_rows = 0;
  int64_t head_dim = 0;
  const char* packed_k = nullptr;  // from AttentionKernels::pack_k
  int64_t first_visible = 0;
  int64_t block_keys = 0;  // keys of the page that make one block: 8, 16, 32 or 128
  // Of row r and the page's block b, at r * stride + b: the greatest logit, and the sum of
  // 2^(logit - greatest). Blocks that the row does not see are not written.
  float* max = nullptr;
  float* sum = nullptr;
  int64_t stride = 0;
};

// Stats of the query rows of one block, all of which see all of num_blocks blocks.
struct ReduceArgs {
  const float* max = nullptr;  // row r at r * stride
  const float* sum = nullptr;
  int64_t stride = 0;  // multiple of kStatsAlign; what lies behind num_blocks is ignored
  int64_t num_rows = 0;
  int64_t num_blocks = 0;
  // With L the base-2 log of a row's sum over all its blocks: log_max[b] is the greatest max - L of
  // the rows, mass[b] the mean of 2^(max - L) * sum. `stride` values are written.
  float* log_max = nullptr;
  float* mass = nullptr;
};
inline constexpr int64_t kStatsAlign = 16;

// `void*` points at elements of the table's compute type.
struct SelectionKernels {
  // out = mean of `num_heads` vectors of head_dim elements, head_stride elements apart: fp32 sum in
  // rising order, one division, rounded once.
  void (*pool)(const void* heads, int64_t num_heads, int64_t head_stride, int64_t head_dim,
               void* out);
  // Bytes of a packed query tile.
  int64_t (*packed_q_bytes)(int64_t num_rows, int64_t head_dim);
  // Row r of the tile is at q + r * q_stride elements.
  void (*pack_q)(const void* q, int64_t q_stride, int64_t num_rows, int64_t head_dim,
                 float* packed_q);
  void (*block_stats)(const BlockStatsArgs& args);
  void (*reduce_rows)(const ReduceArgs& args);
};

}  // namespace headstart::simd
