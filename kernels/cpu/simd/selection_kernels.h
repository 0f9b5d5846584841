// The inner loops of block selection, compiled once per instruction set; part of KernelTable.
//
// Steps 1 and 2 of ProxyAttn are one computation on different tokens: the softmax of some query
// rows over all keys before them, reduced block by block to its maximum and its mass. Step 1 runs
// it on every stride-th token, pooled over heads; step 2 on all tokens of the last query block.
// Logits are in powers of two: q . k * log2(e) / sqrt(head_dim).
#pragma once

#include <cstdint>

namespace headstart::simd {

// Rows of one query tile against one packed page of kBlockTokens keys. Row r sees the keys of the
// page up to key first_visible + r; none where that is negative.
struct BlockStatsArgs {
  const float* packed_q = nullptr;  // from pack_q
  int64_t num_rows = 0;
  int64_t head_dim = 0;
  const char* packed_k = nullptr;  // from AttentionKernels::pack_k
  int64_t first_visible = 0;
  int64_t block_keys = 0;  // keys of the page that make one block: 8, 16, 32 or 128
  // Of row r and the page's block b, at r * stride + b: the greatest logit, and the sum of
  // 2^(logit - greatest). A block that the row does not see gets a maximum of -1e30 or less and any
  // finite sum.
  float* max = nullptr;
  float* sum = nullptr;
  int64_t stride = 0;
};

// `void*` points at elements of the table's compute type.
struct SelectionKernels {
  // out = mean of `num_heads` rows of head_dim elements, head_stride elements apart: fp32 sum in
  // rising order, one division, rounded once.
  void (*pool)(const void* heads, int64_t num_heads, int64_t head_stride, int64_t head_dim,
               void* out);
  // Floats of a packed query tile.
  int64_t (*packed_q_floats)(int64_t num_rows, int64_t head_dim);
  void (*pack_q)(const void* q, int64_t q_stride, int64_t num_rows, int64_t head_dim,
                 float* packed_q);
  void (*block_stats)(const BlockStatsArgs& args);
  // Reduces the stats of num_rows rows over num_blocks blocks (row r at r * stride; stride is a
  // multiple of 16, and the values up to it may be read). With L the row's log2-sum of all blocks:
  // log_max[b] = max over rows of max - L; mass[b] = mean over rows of 2^(max - L) * sum.
  void (*reduce_rows)(const float* max, const float* sum, int64_t stride, int64_t num_rows,
                      int64_t num_blocks, float* log_max, float* mass);
};

}  // namespace headstart::simd
