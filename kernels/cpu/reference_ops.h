// The truth for every backend: each operation as one plain scalar loop with double accumulation, on
// host memory.
//
// Values travel as float, so inputs that a backend holds in bf16 are exact here. A result is
// rounded once, to float; nothing is rounded in between unless the operation says so.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "kernels/attention_params.h"
#include "kernels/base/dtype.h"
#include "kernels/tensor.h"

namespace headstart::reference {

// A dense row-major matrix that owns its values.
struct HostMatrix {
  int64_t rows = 0;
  int64_t cols = 0;
  std::vector<float> values;

  HostMatrix() = default;
  HostMatrix(int64_t num_rows, int64_t num_cols)
      : rows(num_rows), cols(num_cols), values(num_rows * num_cols) {}
  float* Row(int64_t r) { return values.data() + r * cols; }
  const float* Row(int64_t r) const { return values.data() + r * cols; }
};

// ---- conversion; `matrix` and `pages` are host memory

// The nearest value that `dtype` (kF32 or kBF16) can hold.
float RoundTo(float value, DType dtype);
HostMatrix Load(const Matrix& matrix);             // any dtype but kI32
void Store(const HostMatrix& values, Matrix out);  // kF32 or kBF16, same shape

// ---- model

// out[i] = table[ids[i]].
HostMatrix Embed(absl::Span<const int32_t> ids, const HostMatrix& table);
// x / sqrt(mean(x^2) + eps) * weight, row by row.
HostMatrix RmsNorm(const HostMatrix& x, absl::Span<const float> weight, double eps);
// x W^T + b. weight: [out, in]; bias: [out] or empty.
HostMatrix Linear(const HostMatrix& x, const HostMatrix& weight, absl::Span<const float> bias);
// RMSNorm of each of `num_heads` heads of head_dim columns, from column `first_col` on, in place
// (Qwen3).
void NormHeads(HostMatrix& x, int64_t first_col, int32_t num_heads, absl::Span<const float> weight,
               double eps);
// Rotates `num_heads` heads of 2 * inv_freq.size() columns, from column `first_col` on, in place:
// column i with column i + d/2 (Hugging Face's "rotate half"). Row r has position first_position +
// r. The angle is the fp32 product position * inv_freq[i], as Hugging Face takes it; cos and sin
// are multiplied by `scaling` (yarn).
void ApplyRope(HostMatrix& x, int64_t first_col, int32_t num_heads,
               absl::Span<const float> inv_freq, float scaling, int64_t first_position);
// silu(gate) * up. gate_up: [n, 2 f], gate in the first f columns.
HostMatrix SwiGlu(const HostMatrix& gate_up);
// log softmax(logits)[id].
double LogProb(absl::Span<const float> logits, int32_t id);

// ---- KV cache

// Keys and values of the tokens 0, 1, … of a sequence: [num_tokens, num_kv_heads * head_dim].
struct KvRows {
  HostMatrix k;
  HostMatrix v;
};
// Writes `rows` to tokens first_position … of a sequence's pages, rounded to their dtype.
void StoreKv(const KvRows& rows, int64_t first_position, const KvPages& pages,
             const int32_t* page_table);
// Reads tokens [0, num_tokens).
KvRows LoadKv(const KvPages& pages, const int32_t* page_table, int64_t num_tokens);

// The E4M3 number nearest to `value`, ties to the even one, at most 448 in magnitude.
uint8_t NearestFloat8E4M3(float value);
// One page in fp8, as Backend::QuantizeKv says; tokens from num_tokens on are 0.
std::vector<uint8_t> QuantizePage(const KvPages& pages, int64_t page, int64_t num_tokens);

// ---- attention

// Causal GQA attention, scale 1 / sqrt(head_dim). q: [n, H d], its row r at position first_position
// + r; kv: at least the tokens [0, first_position + n). With a selection (may be null: dense), head
// h of block row m sees the first Count(h, m) blocks of its proxy's ranking only.
HostMatrix Attention(const HostMatrix& q, const KvRows& kv, const HeadShape& shape,
                     int64_t first_position, const BlockSelection* selection);

}  // namespace headstart::reference
