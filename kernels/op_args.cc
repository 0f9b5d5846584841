#include "kernels/op_args.h"

#include <algorithm>
#include <string>

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"

namespace headstart {
namespace {

absl::Status CheckMatrix(const OpLimits& limits, absl::string_view name, const Matrix& m,
                         DType dtype, int64_t rows, int64_t cols) {
  const bool aligned = reinterpret_cast<uintptr_t>(m.data) % limits.row_bytes == 0 &&
                       (m.rows <= 1 || m.row_stride * DTypeBytes(dtype) % limits.row_bytes == 0);
  if (m.dtype == dtype && m.rows == rows && m.cols == cols && m.row_stride >= cols && aligned) {
    return absl::OkStatus();
  }
  std::string message =
      absl::StrCat(name, " is ", DTypeName(m.dtype), " [", m.rows, ", ", m.cols, "] with stride ",
                   m.row_stride, ", expected ", DTypeName(dtype), " [", rows, ", ", cols, "]");
  if (limits.row_bytes > 1) absl::StrAppend(&message, " with rows on ", limits.row_bytes, " bytes");
  return absl::InvalidArgumentError(message);
}

// For the elementwise kernels and attention, which may take several columns at a time.
absl::Status CheckActivations(const OpLimits& limits, absl::string_view name, const Matrix& m,
                              DType dtype, int64_t rows, int64_t cols) {
  if (cols <= 0 || cols % limits.row_values != 0) {
    return absl::InvalidArgumentError(absl::StrCat(
        name, " has ", cols, " columns; this backend takes multiples of ", limits.row_values));
  }
  return CheckMatrix(limits, name, m, dtype, rows, cols);
}

// `end`: where the rows of the sequence before end; moved on.
absl::Status CheckRows(const SequenceRows& rows, int64_t matrix_rows, int64_t& end) {
  if (rows.num_rows <= 0 || rows.first_row < end || rows.num_rows > matrix_rows - rows.first_row) {
    return absl::InvalidArgumentError(
        absl::StrCat("a sequence has ", rows.num_rows, " rows from row ", rows.first_row,
                     "; it must have some, behind the sequence before (row ", end,
                     ") and within the matrix (", matrix_rows, " rows)"));
  }
  if (rows.first_position < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("first_position=", rows.first_position, " is negative"));
  }
  if (rows.page_table == nullptr) {
    return absl::InvalidArgumentError("a sequence has no page table");
  }
  end = rows.first_row + rows.num_rows;
  return absl::OkStatus();
}

absl::Status CheckKv(const OpLimits& limits, const KvPages& kv) {
  if (kv.dtype != limits.compute_dtype) {
    return absl::InvalidArgumentError(absl::StrCat("KV pages are ", DTypeName(kv.dtype),
                                                   ", expected ", DTypeName(limits.compute_dtype)));
  }
  return CheckHeads(limits, kv.shape);
}

absl::Status CheckProxyAttn(const ProxyAttnOptions& options, const HeadShape& shape) {
  const int32_t g = options.num_proxies;
  if (g < 1 || shape.num_heads % g != 0 ||
      (shape.num_kv_heads % g != 0 && g % shape.num_kv_heads != 0)) {
    return absl::InvalidArgumentError(absl::StrCat("num_proxies=", g, " does not fit ",
                                                   shape.num_heads, " query heads and ",
                                                   shape.num_kv_heads, " KV heads"));
  }
  if (options.stride != 4 && options.stride != 8 && options.stride != 16) {
    return absl::InvalidArgumentError(
        absl::StrCat("stride=", options.stride, " is not 4, 8 or 16"));
  }
  return absl::OkStatus();
}

absl::Status CheckSelection(const AttentionSequence& sequence, const HeadShape& shape) {
  if (sequence.proxy_attn == nullptr) {
    if (sequence.selection == nullptr) return absl::OkStatus();
    return absl::InvalidArgumentError("a dense sequence has no selection to read");
  }
  const int64_t first_position = sequence.rows.first_position;
  if (first_position % kBlockTokens != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("first_position=", first_position, " is not a multiple of ", kBlockTokens));
  }
  if (sequence.budget_ratio == nullptr) {
    return absl::InvalidArgumentError("a sequence with proxy_attn has no budget_ratio");
  }
  return CheckProxyAttn(*sequence.proxy_attn, shape);
}

}  // namespace

absl::Status CheckHeads(const OpLimits& limits, const HeadShape& shape) {
  if (shape.num_kv_heads > 0 && shape.num_heads > 0 && shape.num_heads % shape.num_kv_heads == 0 &&
      shape.head_dim > 0 && shape.head_dim % limits.head_dim_step == 0 &&
      shape.head_dim <= limits.max_head_dim) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(absl::StrCat(
      shape.num_heads, " query heads, ", shape.num_kv_heads, " KV heads, head_dim ", shape.head_dim,
      ": KV heads must divide query heads, head_dim must be a multiple of ", limits.head_dim_step,
      " up to ", limits.max_head_dim));
}

absl::Status CheckShape(const OpLimits& limits, const ModelShape& model) {
  const auto refuse = [](absl::string_view field, int64_t value, int64_t step, int64_t most) {
    return absl::InvalidArgumentError(
        absl::StrCat(field, "=", value, " is not a multiple of ", step,
                     most > 0 ? absl::StrCat(" up to ", most) : "", ", which this device takes"));
  };
  const HeadShape& heads = model.heads;
  if (heads.head_dim % limits.head_dim_step != 0 || heads.head_dim > limits.max_head_dim) {
    return refuse("head_dim", heads.head_dim, limits.head_dim_step, limits.max_head_dim);
  }
  if (model.hidden_size % limits.row_values != 0) {
    return refuse("hidden_size", model.hidden_size, limits.row_values, 0);
  }
  if (model.intermediate_size % limits.row_values != 0) {
    return refuse("intermediate_size", model.intermediate_size, limits.row_values, 0);
  }
  return CheckHeads(limits, heads);
}

absl::Status CheckEmbed(const OpLimits& limits, absl::Span<const int32_t> ids, const Buffer& table,
                        const Matrix& out) {
  HEADSTART_RETURN_IF_ERROR(CheckActivations(limits, "embedding output", out, limits.residual_dtype,
                                             static_cast<int64_t>(ids.size()), out.cols));
  const int64_t vocab_size = table.bytes() / (out.cols * DTypeBytes(limits.compute_dtype));
  for (size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] >= 0 && ids[i] < vocab_size) continue;
    return absl::InvalidArgumentError(
        absl::StrCat("token_ids[", i, "]=", ids[i], " is not below vocab_size ", vocab_size));
  }
  return absl::OkStatus();
}

absl::Status CheckRmsNorm(const OpLimits& limits, const Matrix& x, const Matrix& out) {
  HEADSTART_RETURN_IF_ERROR(
      CheckActivations(limits, "norm input", x, limits.residual_dtype, x.rows, x.cols));
  return CheckActivations(limits, "norm output", out, limits.compute_dtype, x.rows, x.cols);
}

absl::Status CheckLinear(const OpLimits& limits, const LinearWeight& weight, const Matrix& in,
                         const Matrix& out, LinearOutput mode) {
  const DType stored = out.dtype == DType::kF32 ? DType::kF32 : limits.compute_dtype;
  const DType out_dtype = mode == LinearOutput::kAdd ? limits.residual_dtype : stored;
  HEADSTART_RETURN_IF_ERROR(
      CheckMatrix(limits, "linear input", in, limits.compute_dtype, in.rows, weight.in_features()));
  return CheckMatrix(limits, "linear output", out, out_dtype, in.rows, weight.out_features());
}

absl::Status CheckRope(const OpLimits& limits, const RopeArgs& args) {
  HEADSTART_RETURN_IF_ERROR(CheckKv(limits, args.kv));
  HEADSTART_RETURN_IF_ERROR(CheckActivations(limits, "qkv", args.qkv, limits.compute_dtype,
                                             args.qkv.rows, args.kv.shape.qkv_cols()));
  if ((args.q_norm == nullptr) != (args.k_norm == nullptr)) {
    return absl::InvalidArgumentError("QK-norm needs both weights, of queries and of keys");
  }
  const RopeTable& rope = *args.rope;
  int64_t end = 0;
  for (const RopeSequence& sequence : args.sequences) {
    const SequenceRows& rows = sequence.rows;
    HEADSTART_RETURN_IF_ERROR(CheckRows(rows, args.qkv.rows, end));
    if (rows.num_rows > rope.max_positions() - rows.first_position ||
        rope.head_dim() != args.kv.shape.head_dim) {
      return absl::InvalidArgumentError(
          absl::StrCat("RoPE for positions ", rows.first_position, " to ",
                       rows.first_position + rows.num_rows, ", head_dim ", args.kv.shape.head_dim,
                       "; the table has ", rope.max_positions(), ", head_dim ", rope.head_dim()));
    }
  }
  return absl::OkStatus();
}

absl::Status CheckAttention(const OpLimits& limits, const AttentionArgs& args) {
  const HeadShape& shape = args.kv.shape;
  const int64_t cols = int64_t{shape.num_heads} * shape.head_dim;
  HEADSTART_RETURN_IF_ERROR(CheckKv(limits, args.kv));
  HEADSTART_RETURN_IF_ERROR(
      CheckActivations(limits, "q", args.q, limits.compute_dtype, args.q.rows, cols));
  HEADSTART_RETURN_IF_ERROR(CheckActivations(limits, "attention output", args.out,
                                             limits.compute_dtype, args.q.rows, cols));
  int64_t end = 0;
  for (const AttentionSequence& sequence : args.sequences) {
    HEADSTART_RETURN_IF_ERROR(CheckRows(sequence.rows, args.q.rows, end));
    HEADSTART_RETURN_IF_ERROR(CheckSelection(sequence, shape));
  }
  return absl::OkStatus();
}

absl::Status CheckSwiGlu(const OpLimits& limits, const Matrix& gate_up, const Matrix& out) {
  HEADSTART_RETURN_IF_ERROR(
      CheckActivations(limits, "gate_up", gate_up, limits.compute_dtype, out.rows, 2 * out.cols));
  return CheckActivations(limits, "SwiGLU output", out, limits.compute_dtype, out.rows, out.cols);
}

absl::Status CheckQuantizeKv(const OpLimits& limits, const QuantizeKvArgs& args) {
  HEADSTART_RETURN_IF_ERROR(CheckKv(limits, args.kv));
  for (const KvPageTokens& page : args.pages) {
    if (page.page >= 0 && page.num_tokens > 0 && page.num_tokens <= kBlockTokens) continue;
    return absl::InvalidArgumentError(absl::StrCat("page ", page.page, " with ", page.num_tokens,
                                                   " tokens; pages count from 0 and have 1 to ",
                                                   kBlockTokens, " tokens"));
  }
  return absl::OkStatus();
}

SequenceAttention::SequenceAttention(const AttentionArgs& args, const AttentionSequence& sequence)
    : q(args.q.Rows(sequence.rows.first_row, sequence.rows.num_rows)),
      out(args.out.Rows(sequence.rows.first_row, sequence.rows.num_rows)),
      kv(args.kv),
      page_table(sequence.rows.page_table),
      first_position(sequence.rows.first_position),
      proxy_attn(sequence.proxy_attn),
      ends_prompt(sequence.ends_prompt),
      budget_ratio(sequence.budget_ratio) {}

int64_t CausalBlocks(const HeadShape& shape, const SequenceRows& rows) {
  const int64_t begin = rows.first_position / kBlockTokens;
  const int64_t end = NumBlocks(rows.first_position + rows.num_rows);
  return shape.num_heads * (end * (end + 1) - begin * (begin + 1)) / 2;
}

bool IsDenseByRule(const ProxyAttnOptions& options, int64_t num_tokens) {
  return !options.enabled || num_tokens <= options.dense_below_tokens;
}

int64_t BudgetForDensity(int64_t begin, int64_t end, double density) {
  const int64_t causal = (end * (end + 1) - begin * (begin + 1)) / 2;
  const double wanted = density * static_cast<double>(causal);
  // One more block of budget adds one block to every row that has as many.
  int64_t budget = 0, kept = 0;
  do {
    kept += end - std::max(begin, budget);
    ++budget;
  } while (budget < end && static_cast<double>(kept) < wanted);
  return budget;
}

}  // namespace headstart
