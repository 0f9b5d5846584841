// The kernels of the CUDA backend, as functions that enqueue them. Every launcher enqueues on
// `stream`, does not synchronise and allocates nothing; what it points to must live until the
// stream has passed. All pointers are device memory, all activations bf16, 16-byte aligned, with
// row strides (in elements) that are multiples of 8.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/attention_params.h"
#include "kernels/cuda/selection_memory.h"

namespace headstart::cuda {

// ---- elementwise

// out[i] = table[ids[i]]. table: [vocab, hidden]; out: [num_ids, hidden].
struct EmbeddingParams {
  const int32_t* ids;
  const void* table;
  void* out;
  int64_t num_ids, hidden, out_stride;
};
cudaError_t LaunchEmbedding(const EmbeddingParams& params, cudaStream_t stream);

// out = x / sqrt(mean(x^2) + eps) * weight, row by row. weight: f32 [hidden]; hidden a multiple of
// 8.
struct RmsNormParams {
  const void* x;
  const float* weight;
  void* out;
  int64_t rows, hidden, x_stride, out_stride;
  float eps;
};
cudaError_t LaunchRmsNorm(const RmsNormParams& params, cudaStream_t stream);

// out = silu(gate) * up; gate_up: [rows, 2 cols], gate first; out: [rows, cols]; cols a multiple of
// 8.
struct SwiGluParams {
  const void* gate_up;
  void* out;
  int64_t rows, cols, gate_up_stride, out_stride;
};
cudaError_t LaunchSwiGlu(const SwiGluParams& params, cudaStream_t stream);

// cos_sin[position][i] = scaling * (cos, sin)(position * inv_freq[i]), the product in fp32.
struct RopeTableParams {
  const float* inv_freq;  // [half]
  float2* cos_sin;        // [positions][half]
  int64_t positions, half;
  float scaling;
};
cudaError_t LaunchRopeTable(const RopeTableParams& params, cudaStream_t stream);

// Sequences of one launch. More of them take more launches.
inline constexpr int kMaxSequences = 16;

// Q and K heads: RMSNorm where a weight is given, then RoPE ("rotate half"). Q in place, K and V to
// the pages.
struct RopeKvWriteParams {
  struct Sequence {
    SequenceRows rows;
    uint32_t* not_finite;  // or null: set to 1, never cleared, by a K or V that is infinite or NaN
  };
  Sequence sequences[kMaxSequences];
  int num_sequences;  // 1 to kMaxSequences
  void* qkv;          // [rows, (H + 2 H_kv) d]
  int64_t qkv_stride;
  const float2* cos_sin;  // [positions][d / 2]
  const float* q_norm;    // f32 [d] or null
  const float* k_norm;
  float eps;
  KvPages kv;
};
cudaError_t LaunchRopeKvWrite(const RopeKvWriteParams& params, cudaStream_t stream);

// Sets *differs to whether two stretches of memory differ: 1, else 0. bytes: a multiple of 4.
struct CompareParams {
  const void* a;
  const void* b;
  int64_t bytes;
  uint32_t* differs;
};
cudaError_t LaunchCompare(const CompareParams& params, cudaStream_t stream);

// KV pages to fp8, see Backend::QuantizeKv.
inline constexpr int kMaxQuantizedPages = 256;
struct QuantizeKvParams {
  struct Page {
    int32_t page, num_tokens;
  };
  Page pages[kMaxQuantizedPages];
  int num_pages;  // 1 to kMaxQuantizedPages
  KvPages kv;     // d 64 or 128
  void* out;      // [num_pages] pages of Fp8PageBytes, 8-byte aligned
};
cudaError_t LaunchQuantizeKv(const QuantizeKvParams& params, cudaStream_t stream);

// ---- attention

// Kept key blocks of every head and query block, or all of them.
struct KeptBlocks {
  // Per head, `head_stride` entries; the row m (query block) starts at RankingOffset(m) of
  // BlockSelection and holds its count[head][m - first_row] blocks in falling order, the diagonal
  // first. Null: dense.
  const uint16_t* lists = nullptr;
  const int32_t* counts = nullptr;  // [num_heads][num_rows]
  int64_t head_stride = 0;
};

// One of the sequences of a launch; its pages hold tokens [0, first_position + num_rows).
struct AttendedSequence {
  SequenceRows rows;  // first_position: any when dense, a multiple of kBlockTokens with lists
  KeptBlocks kept;
  BlockCounts* counts = nullptr;  // when dense, or null: its blocks are added
};

// Causal GQA attention, scale 1 / sqrt(d), d 64 or 128, of sequences that share a pool of pages.
// Rows of no sequence are not written. Deterministic bit for bit, whatever else is in the launch.
struct AttentionParams {
  const void* q;  // [rows, q_stride], the rows of all sequences
  void* out;
  int64_t rows, q_stride, out_stride;
  KvPages kv;
  const AttendedSequence* sequences;  // host memory, read by the call
  int num_sequences;                  // 1 to kMaxSequences
  uint32_t* tile_counter;             // one word, 0; left 0; one launch at a time
  int num_sms;
};
cudaError_t LaunchAttention(const AttentionParams& params, cudaStream_t stream);

// ---- block selection (ProxyAttn, arXiv 2509.24745); words as in kernels/attention_params.h

// Every stride-th token from token 0 on, averaged over the heads of a group: fp32 sum in rising
// head order, divided, rounded to bf16. out: [num_groups][num_samples][d].
struct PoolQueriesParams {
  const void* q;
  int64_t rows, q_stride;
  HeadShape shape;
  int32_t num_groups, stride;
  void* out;
};
cudaError_t LaunchPoolQueries(const PoolQueriesParams& params, cudaStream_t stream);
struct PoolKeysParams {
  KvPages kv;
  const int32_t* page_table;
  int64_t num_tokens;
  int32_t num_groups, stride;
  void* out;
};
cudaError_t LaunchPoolKeys(const PoolKeysParams& params, cudaStream_t stream);

// Block scores of the query blocks [first_row, first_row + num_rows): log2 of the max-pooled
// softmax of the sampled logits. Ranks like the probabilities do.
struct ProxyScoreParams {
  const void* q;  // [num_proxies][num_q][d] with these strides, in elements
  int64_t q_head_stride, q_row_stride;
  const void* k;  // [num_key_heads][first_sample + num_q][d], contiguous; proxy p reads the head
                  // p * num_key_heads / num_proxies
  int64_t num_q;  // sampled queries
  int64_t first_sample;  // sampled index of query 0; first_row * kBlockTokens / stride
  int32_t num_proxies, num_key_heads, head_dim, stride;
  void* row_maxima;      // scratch: PlanProxyScore
  void* row_sums;        // scratch: PlanProxyScore
  float* scores;         // [num_proxies][num_rows][score_stride]; blocks n > m are not written
  int64_t score_stride;  // >= key blocks
  float* log_sums;       // out, or null: log2-sum-exp of every sampled query, [num_proxies][num_q]
  uint32_t* tile_counter;  // as in AttentionParams
  int num_sms;
};
cudaError_t LaunchProxyScore(const ProxyScoreParams& params, cudaStream_t stream);

// Estimated mass of every row's key blocks, from the sampled tokens: the sum of a row is 1.
struct RowMassParams {
  ProxyScoreParams scores;  // of a LaunchProxyScore on the same stream, with log_sums
  float* mass;              // [num_proxies][num_rows][score_stride]; blocks n > m are not written
};
cudaError_t LaunchRowMass(const RowMassParams& params, cudaStream_t stream);

// Attention mass of every key block in the last query block of a piece: mass[head][n] >= 0, each
// head's sum is 1.
struct BlockMassParams {
  const void* q;  // the piece's, [rows, H d]
  int64_t rows, q_stride, first_position;
  KvPages kv;
  const int32_t* page_table;
  float2* partial;  // scratch: [num_heads][key blocks][kBlockTokens] {maximum, sum}
  float* log_sums;  // scratch: [num_heads][kBlockTokens]
  float* mass;      // [num_heads][key blocks]
  int num_sms;
};
cudaError_t LaunchBlockMass(const BlockMassParams& params, cudaStream_t stream);

// What the launches below share.
struct SelectionShape {
  int32_t num_heads, num_proxies;
  int64_t first_row, num_rows;  // query blocks
  int64_t score_stride;
  int32_t sink_blocks, local_blocks, dense_tail_rows;

  __host__ __device__ int64_t num_key_blocks() const { return first_row + num_rows; }
};

// Per head, the least number of blocks whose mass reaches gamma: in order of falling mass (own), or
// of the proxy's ranking of the last row (shared). Raises budget_ratio to it; keeps max(floor,
// ratio of all key blocks).
struct HeadBudgetParams {
  SelectionShape shape;
  bool shared;
  float gamma;
  int32_t floor_blocks;
  const float* mass;  // [num_heads][key blocks]
  const float* scores;
  float* budget_ratio;     // [num_heads]
  int32_t* budget_blocks;  // out: [num_heads]
};
cudaError_t LaunchHeadBudget(const HeadBudgetParams& params, cudaStream_t stream);
// Per row of a proxy, the least number of blocks whose estimated mass reaches gamma, in order of
// its ranking; at least floor_blocks.
struct RowBudgetParams {
  SelectionShape shape;
  float gamma;
  int32_t floor_blocks;
  const float* mass;     // [num_proxies][num_rows][score_stride]
  const float* scores;   // likewise
  int32_t* row_budgets;  // out: [num_proxies][num_rows]
};
cudaError_t LaunchRowBudget(const RowBudgetParams& params, cudaStream_t stream);
cudaError_t LaunchFixedBudget(int32_t num_heads, int32_t blocks, int32_t* budget_blocks,
                              cudaStream_t stream);

// Turns budgets into counts and lists of blocks; all counts are m + 1 when more than
// dense_above_density of the causal blocks would be kept.
struct BlockSelectParams {
  SelectionShape shape;
  const int32_t* budget_blocks;  // [num_heads]; not read with row_budgets
  const int32_t* row_budgets;    // [num_proxies][num_rows], or null
  const float* scores;
  float dense_above_density;
  BlockCounts* totals;  // out: what this selection keeps
  BlockCounts* sum;     // or null: the same is added
  uint16_t* lists;      // out, as in KeptBlocks
  int32_t* counts;      // out
  int64_t head_stride;
};
cudaError_t LaunchBlockSelect(const BlockSelectParams& params, cudaStream_t stream);

}  // namespace headstart::cuda
