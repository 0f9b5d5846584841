// What all backends ask of the arguments of their operations, and the rules of block selection that
// need no scores. Every Check is OK or INVALID_ARGUMENT with the argument that is out of range,
// what it is, and what it may be.
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "kernels/backend.h"

namespace headstart {

// Where backends differ.
struct OpLimits {
  DType compute_dtype = DType::kBF16;
  DType residual_dtype = DType::kBF16;
  int64_t row_bytes = 1;   // rows of matrices begin at multiples of it
  int64_t row_values = 1;  // rows of activations have a multiple of it, but those of Linear
  int32_t head_dim_step = 1;
  int32_t max_head_dim = 1;
  int64_t max_tokens = int64_t{1} << 40;  // of a sequence
};

// What Check… below will ask of the matrices of a model.
absl::Status CheckShape(const OpLimits& limits, const ModelShape& model);
absl::Status CheckHeads(const OpLimits& limits, const HeadShape& shape);
absl::Status CheckEmbed(const OpLimits& limits, absl::Span<const int32_t> ids, const Buffer& table,
                        const Matrix& out);
absl::Status CheckRmsNorm(const OpLimits& limits, const Matrix& x, const Matrix& out);
absl::Status CheckLinear(const OpLimits& limits, const LinearWeight& weight, const Matrix& in,
                         const Matrix& out, LinearOutput mode);
absl::Status CheckRope(const OpLimits& limits, const RopeArgs& args);
absl::Status CheckAttention(const OpLimits& limits, const AttentionArgs& args);
absl::Status CheckSwiGlu(const OpLimits& limits, const Matrix& gate_up, const Matrix& out);
absl::Status CheckQuantizeKv(const OpLimits& limits, const QuantizeKvArgs& args);

// One sequence of an Attention call, its rows cut out of the matrices.
struct SequenceAttention {
  SequenceAttention() = default;
  SequenceAttention(const AttentionArgs& args, const AttentionSequence& sequence);
  int64_t num_tokens() const { return first_position + q.rows; }

  Matrix q;
  Matrix out;
  KvPages kv;
  const int32_t* page_table = nullptr;
  int64_t first_position = 0;
  const ProxyAttnOptions* proxy_attn = nullptr;  // and what follows: as in AttentionSequence
  bool ends_prompt = false;
  float* budget_ratio = nullptr;
};

// Query-key blocks of a sequence's rows when nothing is left out, over all heads.
int64_t CausalBlocks(const HeadShape& shape, const SequenceRows& rows);

// Whether the options say so without a look at the queries: not enabled, or a sequence of at most
// dense_below_tokens tokens.
bool IsDenseByRule(const ProxyAttnOptions& options, int64_t num_tokens);

// The least budget in blocks with which the rows [begin, end) keep `density` of their causal
// blocks.
int64_t BudgetForDensity(int64_t begin, int64_t end, double density);

}  // namespace headstart
