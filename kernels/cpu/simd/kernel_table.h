// The inner loops of the CPU backend, compiled once per instruction set and reached through tables
// of functions. They run on the calling thread, allocate nothing, and cannot fail.
#pragma once

#include <cstdint>

#include "kernels/attention_params.h"
#include "kernels/base/dtype.h"
#include "kernels/cpu/simd/selection_kernels.h"

namespace headstart {
enum class CpuIsa : uint8_t;  // kernels/cpu/isa.h, whose includes bring code of their own
}

namespace headstart::simd {

inline constexpr int64_t kMaxHeadDim = 256;

// `void*` points at elements of the table's compute type.
struct ElementKernels {
  // out = x / sqrt(mean(x^2) + eps) * weight. x, weight: [n].
  void (*rms_norm)(const float* x, const float* weight, float eps, int64_t n, void* out);
  // Rotates one head (Hugging Face's "rotate half"), after an RMSNorm where `norm` is not null.
  // in, out, norm: [head_dim], in may be out; cos, sin: [head_dim / 2].
  void (*rope_head)(const void* in, const float* cos, const float* sin, const float* norm,
                    float norm_eps, int64_t head_dim, void* out);
  // out = silu(gate) * up, all [n].
  void (*swiglu)(const void* gate, const void* up, int64_t n, void* out);
  void (*to_float)(const void* in, int64_t n, float* out);
  bool (*all_finite)(const void* in, int64_t n);
  // A head of a page to E4M3 numbers, see Backend::QuantizeKv; returns the scale. in, out: [n].
  float (*quantize)(const void* in, int64_t n, uint8_t* out);
};

// Attention of up to kBlockTokens query rows of one head over listed key blocks.
struct TileArgs {
  const void* q = nullptr;  // row r at q + r * q_stride elements
  int64_t q_stride = 0;
  int64_t num_rows = 0;            // 1 .. kBlockTokens
  int64_t first_position = 0;      // of row 0
  int64_t head_dim = 0;            // multiple of 16
  const char* packed_k = nullptr;  // the head's packed pages, one after the other
  const char* packed_v = nullptr;
  int64_t page_stride_bytes = 0;    // from a packed page of this head to its next one
  const int32_t* blocks = nullptr;  // rising key blocks, or null: 0 .. num_blocks - 1
  int64_t num_blocks = 0;
  void* out = nullptr;  // row r at out + r * out_stride elements
  int64_t out_stride = 0;
  void* scratch = nullptr;  // tile_scratch_bytes(head_dim), 64-byte aligned
};

// Attention of one query row over a range of one KV head's tokens, pages as they are.
struct RowArgs {
  const void* q = nullptr;  // [group_size][head_dim], the query heads that read this KV head
  int64_t group_size = 0;
  int64_t head_dim = 0;
  const KvPages* kv = nullptr;
  const int32_t* page_table = nullptr;
  int32_t kv_head = 0;
  int64_t token_begin = 0;  // multiple of kBlockTokens
  int64_t token_end = 0;    // at most kRowTokens after token_begin
  // Per query head head_dim + 2 values: sum of p_j v_j, the greatest logit m (times log2 e), and
  // the sum of p_j, with p_j = 2^(logit_j - m).
  float* partial = nullptr;
};
inline constexpr int64_t kRowTokens = 8 * kBlockTokens;

struct AttentionKernels {
  // Bytes of one packed page of one KV head; multiple of 64. K and V take the same.
  int64_t (*packed_page_bytes)(int64_t head_dim);
  int64_t (*tile_scratch_bytes)(int64_t head_dim);
  // Brings K or V of one page and head, [num_tokens][head_dim], to the form that `tile` multiplies;
  // tokens from num_tokens on become zero.
  void (*pack_k)(const void* page, int64_t num_tokens, int64_t head_dim, char* packed);
  void (*pack_v)(const void* page, int64_t num_tokens, int64_t head_dim, char* packed);
  void (*tile)(const TileArgs& args);
  void (*row)(const RowArgs& args);
};

struct KernelTable {
  ElementKernels element;
  AttentionKernels attention;
  SelectionKernels selection;
};

// Tables exist for f32 on every instruction set and for bf16 on kAvx512Bf16; null for the rest, and
// for instruction sets of another architecture.
const KernelTable* GetKernelTable(CpuIsa isa, DType compute_dtype);

}  // namespace headstart::simd
