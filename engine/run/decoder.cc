#include "engine/run/decoder.h"

#include <algorithm>

#include "kernels/base/check.h"
#include "kernels/base/status_macros.h"

namespace headstart {
namespace {

// Rows that the FFN takes at once: its inner activations are the widest of all, and nothing but the
// row's own result needs them.
constexpr int64_t kFfnRows = 2048;

Matrix View(const Buffer& buffer, DType dtype, int64_t rows, int64_t cols) {
  return {buffer.data(), dtype, rows, cols, cols};
}

// Bytes of each activation buffer, in the order of the members of Decoder.
struct ActivationSizes {
  int64_t hidden, normed, qkv, attended, gate_up, activated, logits, budget_ratio;

  ActivationSizes(const ModelConfig& c, DType compute, DType residual, int64_t max_rows) {
    const int64_t bytes = DTypeBytes(compute);
    const int64_t ffn_rows = std::min(max_rows, kFfnRows);
    const int64_t f32 = DTypeBytes(DType::kF32);
    hidden = max_rows * c.hidden_size * DTypeBytes(residual);
    normed = max_rows * c.hidden_size * bytes;
    qkv = max_rows * c.heads.qkv_cols() * bytes;
    attended = max_rows * c.heads.num_heads * c.heads.head_dim * bytes;
    gate_up = ffn_rows * 2 * c.intermediate_size * bytes;
    activated = ffn_rows * c.intermediate_size * bytes;
    logits = c.vocab_size * f32;
    budget_ratio = int64_t{c.num_layers} * c.heads.num_heads * f32;
  }
  int64_t Sum() const {
    return hidden + normed + qkv + attended + gate_up + activated + logits + budget_ratio;
  }
};

}  // namespace

int64_t ActivationBytes(const ModelConfig& config, DType compute_dtype, DType residual_dtype,
                        int64_t max_rows) {
  return ActivationSizes(config, compute_dtype, residual_dtype, max_rows).Sum();
}

absl::StatusOr<std::unique_ptr<Decoder>> Decoder::Create(const ModelConfig& config,
                                                         const ModelWeights& weights,
                                                         const KvCache& kv, int64_t max_rows,
                                                         Backend& backend) {
  std::unique_ptr<Decoder> decoder(new Decoder(config, weights, kv, backend));
  HEADSTART_RETURN_IF_ERROR(decoder->Allocate(max_rows));
  return decoder;
}

absl::Status Decoder::Allocate(int64_t max_rows) {
  const ActivationSizes sizes(config_, backend_.compute_dtype(), backend_.residual_dtype(),
                              max_rows);
  HEADSTART_ASSIGN_OR_RETURN(hidden_, backend_.Allocate(sizes.hidden));
  HEADSTART_ASSIGN_OR_RETURN(normed_, backend_.Allocate(sizes.normed));
  HEADSTART_ASSIGN_OR_RETURN(qkv_, backend_.Allocate(sizes.qkv));
  HEADSTART_ASSIGN_OR_RETURN(attended_, backend_.Allocate(sizes.attended));
  HEADSTART_ASSIGN_OR_RETURN(gate_up_, backend_.Allocate(sizes.gate_up));
  HEADSTART_ASSIGN_OR_RETURN(activated_, backend_.Allocate(sizes.activated));
  HEADSTART_ASSIGN_OR_RETURN(logits_, backend_.Allocate(sizes.logits));
  HEADSTART_ASSIGN_OR_RETURN(budget_ratio_, backend_.Allocate(sizes.budget_ratio));
  host_logits_.resize(static_cast<size_t>(config_.vocab_size));
  return absl::OkStatus();
}

absl::Status Decoder::StartSequence() {
  const std::vector<float> zeros(static_cast<size_t>(budget_ratio_.bytes()) / sizeof(float));
  return backend_.Upload(zeros.data(), budget_ratio_.bytes(), budget_ratio_.data());
}

absl::Status Decoder::Embed(const Chunk& chunk) {
  const auto rows = static_cast<int64_t>(chunk.token_ids.size());
  return backend_.Embed(chunk.token_ids, weights_.embedding,
                        View(hidden_, backend_.residual_dtype(), rows, config_.hidden_size));
}

absl::Status Decoder::RunLayer(int32_t layer, const Chunk& chunk) {
  const LayerWeights& w = weights_.layers[layer];
  HEADSTART_RETURN_IF_ERROR(RunQkv(w, layer, chunk));

  // Behind the last layer nothing is read but the row of the last token, so of its rows only the
  // last block goes on, and that only where the prompt ends.
  const auto num_rows = static_cast<int64_t>(chunk.token_ids.size());
  const bool is_last = layer + 1 == config_.num_layers;
  if (is_last && !chunk.ends_prompt) return absl::OkStatus();
  const int64_t first = is_last ? (num_rows - 1) / kBlockTokens * kBlockTokens : 0;
  const int64_t rows = num_rows - first;

  const DType compute = backend_.compute_dtype();
  const Matrix x =
      View(hidden_, backend_.residual_dtype(), num_rows, config_.hidden_size).Rows(first, rows);
  const Matrix attended =
      View(attended_, compute, rows, int64_t{config_.heads.num_heads} * config_.heads.head_dim);
  const Matrix normed = View(normed_, compute, rows, config_.hidden_size);
  HEADSTART_RETURN_IF_ERROR(RunAttention(layer, chunk, first, attended));
  HEADSTART_RETURN_IF_ERROR(backend_.Linear(*w.output, attended, x, LinearOutput::kAdd));
  HEADSTART_RETURN_IF_ERROR(
      backend_.RmsNorm(x, w.post_attention_norm, config_.rms_norm_eps, normed));
  return RunFfn(w, x, normed);
}

// Q, K and V of the chunk; K and V go to the cache.
absl::Status Decoder::RunQkv(const LayerWeights& w, int32_t layer, const Chunk& chunk) {
  const auto rows = static_cast<int64_t>(chunk.token_ids.size());
  const DType compute = backend_.compute_dtype();
  const Matrix x = View(hidden_, backend_.residual_dtype(), rows, config_.hidden_size);
  const Matrix normed = View(normed_, compute, rows, config_.hidden_size);
  const Matrix qkv = View(qkv_, compute, rows, config_.heads.qkv_cols());
  HEADSTART_RETURN_IF_ERROR(backend_.RmsNorm(x, w.input_norm, config_.rms_norm_eps, normed));
  HEADSTART_RETURN_IF_ERROR(backend_.Linear(*w.qkv, normed, qkv, LinearOutput::kStore));
  RopeArgs rope;
  rope.qkv = qkv;
  rope.first_position = chunk.first_position;
  rope.rope = weights_.rope.get();
  rope.q_norm = config_.qk_norm ? &w.q_norm : nullptr;
  rope.k_norm = config_.qk_norm ? &w.k_norm : nullptr;
  rope.norm_eps = config_.rms_norm_eps;
  rope.kv = kv_.Layer(layer);
  return backend_.RopeAndStoreKv(rope);
}

// Attention of the chunk's rows from `first_row` (a multiple of kBlockTokens) on.
absl::Status Decoder::RunAttention(int32_t layer, const Chunk& chunk, int64_t first_row,
                                   Matrix out) {
  const HeadShape& heads = config_.heads;
  const Matrix q = View(qkv_, backend_.compute_dtype(), first_row + out.rows, heads.qkv_cols())
                       .Rows(first_row, out.rows)
                       .Cols(0, int64_t{heads.num_heads} * heads.head_dim);
  AttentionArgs attention;
  attention.q = q;
  attention.first_position = chunk.first_position + first_row;
  attention.kv = kv_.Layer(layer);
  attention.layer = layer;
  attention.out = out;
  attention.selected = chunk.proxy_attn != nullptr;
  if (attention.selected) {
    SelectArgs select;
    select.q = q;
    select.first_position = attention.first_position;
    select.kv = attention.kv;
    select.layer = layer;
    select.ends_prompt = chunk.ends_prompt;
    select.options = chunk.proxy_attn;
    select.budget_ratio =
        static_cast<float*>(budget_ratio_.data()) + int64_t{layer} * heads.num_heads;
    HEADSTART_RETURN_IF_ERROR(backend_.SelectBlocks(select));
  }
  return backend_.Attention(attention);
}

// x += down(silu(gate(normed)) * up(normed)), a slice of rows at a time.
absl::Status Decoder::RunFfn(const LayerWeights& w, Matrix x, Matrix normed) {
  const DType compute = backend_.compute_dtype();
  for (int64_t row = 0; row < x.rows; row += kFfnRows) {
    const int64_t rows = std::min(kFfnRows, x.rows - row);
    const Matrix gate_up = View(gate_up_, compute, rows, int64_t{2} * config_.intermediate_size);
    const Matrix activated = View(activated_, compute, rows, config_.intermediate_size);
    HEADSTART_RETURN_IF_ERROR(
        backend_.Linear(*w.gate_up, normed.Rows(row, rows), gate_up, LinearOutput::kStore));
    HEADSTART_RETURN_IF_ERROR(backend_.SwiGlu(gate_up, activated));
    HEADSTART_RETURN_IF_ERROR(
        backend_.Linear(*w.down, activated, x.Rows(row, rows), LinearOutput::kAdd));
  }
  return absl::OkStatus();
}

absl::Status Decoder::RunHead(const Chunk& chunk) {
  HEADSTART_CHECK(chunk.ends_prompt);
  const auto rows = static_cast<int64_t>(chunk.token_ids.size());
  const Matrix x =
      View(hidden_, backend_.residual_dtype(), rows, config_.hidden_size).Rows(rows - 1, 1);
  const Matrix normed = View(normed_, backend_.compute_dtype(), 1, config_.hidden_size);
  const Matrix logits = View(logits_, DType::kF32, 1, config_.vocab_size);
  HEADSTART_RETURN_IF_ERROR(backend_.RmsNorm(x, weights_.final_norm, config_.rms_norm_eps, normed));
  return backend_.Linear(*weights_.lm_head, normed, logits, LinearOutput::kStore);
}

absl::StatusOr<absl::Span<const float>> Decoder::Logits() {
  HEADSTART_RETURN_IF_ERROR(
      backend_.Download(logits_.data(), logits_.bytes(), host_logits_.data()));
  return absl::MakeConstSpan(host_logits_);
}

}  // namespace headstart
