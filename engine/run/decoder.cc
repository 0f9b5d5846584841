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

// From one row of logits to the next, in elements: backends want rows on 16 bytes.
int64_t LogitsStride(const ModelConfig& config) { return (int64_t{config.vocab_size} + 3) / 4 * 4; }

// Bytes of each activation buffer, in the order of the members of Decoder.
struct ActivationSizes {
  int64_t hidden, normed, qkv, attended, gate_up, activated, logits, flags;

  ActivationSizes(const ModelConfig& c, DType compute, DType residual, int64_t max_rows,
                  int64_t max_pieces) {
    const int64_t bytes = DTypeBytes(compute);
    const int64_t ffn_rows = std::min(max_rows, kFfnRows);
    hidden = max_rows * c.hidden_size * DTypeBytes(residual);
    normed = max_rows * c.hidden_size * bytes;
    qkv = max_rows * c.heads.qkv_cols() * bytes;
    attended = max_rows * c.heads.num_heads * c.heads.head_dim * bytes;
    gate_up = ffn_rows * 2 * c.intermediate_size * bytes;
    activated = ffn_rows * c.intermediate_size * bytes;
    logits = max_pieces * LogitsStride(c) * DTypeBytes(DType::kF32);
    flags = c.num_layers * max_pieces * int64_t{sizeof(uint32_t)};
  }
  int64_t Sum() const {
    return hidden + normed + qkv + attended + gate_up + activated + logits + flags;
  }
};

int64_t RowsOf(absl::Span<const DecoderInput> pieces) {
  int64_t rows = 0;
  for (const DecoderInput& piece : pieces) rows += piece.num_tokens();
  return rows;
}

SequenceRows SequenceRowsOf(const DecoderInput& piece, int64_t first_row) {
  return {first_row, piece.num_tokens(), piece.first_position, piece.slot->page_table()};
}

// Behind the last layer nothing is read but the row of a prompt's last token, so of its rows only
// the last block goes on: these come before it.
int64_t RowsBeforeLastBlock(const DecoderInput& piece) {
  return (piece.num_tokens() - 1) / kBlockTokens * kBlockTokens;
}

struct RowRange {
  int64_t begin, end;
};

// The rows that go on behind the last layer's KV; neighbours as one.
std::vector<RowRange> RowsOfLastBlocks(absl::Span<const DecoderInput> pieces) {
  std::vector<RowRange> ranges;
  int64_t row = 0;
  for (const DecoderInput& piece : pieces) {
    const int64_t begin = row + RowsBeforeLastBlock(piece);
    row += piece.num_tokens();
    if (!piece.ends_prompt) continue;
    if (ranges.empty() || ranges.back().end < begin) ranges.push_back({begin, begin});
    ranges.back().end = row;
  }
  return ranges;
}

// All but the first `count` rows.
SequenceRows Behind(const SequenceRows& rows, int64_t count) {
  return {rows.first_row + count, rows.num_rows - count, rows.first_position + count,
          rows.page_table};
}

bool RunsDense(const DecoderInput& piece, int32_t layer) {
  if (piece.proxy_attn == nullptr) return true;
  const std::vector<int32_t>& layers = piece.proxy_attn->dense_layers;
  return std::find(layers.begin(), layers.end(), layer) != layers.end();
}

}  // namespace

int64_t ActivationBytes(const ModelConfig& config, DType compute_dtype, DType residual_dtype,
                        int64_t max_rows, int64_t max_pieces) {
  return ActivationSizes(config, compute_dtype, residual_dtype, max_rows, max_pieces).Sum();
}

absl::StatusOr<std::unique_ptr<Decoder>> Decoder::Create(const ModelConfig& config,
                                                         const ModelWeights& weights,
                                                         const KvCache& kv, int64_t max_rows,
                                                         int64_t max_pieces, Backend& backend) {
  std::unique_ptr<Decoder> decoder(new Decoder(config, weights, kv, max_rows, max_pieces, backend));
  HEADSTART_RETURN_IF_ERROR(decoder->Allocate());
  return decoder;
}

absl::Status Decoder::Allocate() {
  const ActivationSizes sizes(config_, backend_.compute_dtype(), backend_.residual_dtype(),
                              max_rows_, max_pieces_);
  HEADSTART_ASSIGN_OR_RETURN(hidden_, backend_.Allocate(sizes.hidden));
  HEADSTART_ASSIGN_OR_RETURN(normed_, backend_.Allocate(sizes.normed));
  HEADSTART_ASSIGN_OR_RETURN(qkv_, backend_.Allocate(sizes.qkv));
  HEADSTART_ASSIGN_OR_RETURN(attended_, backend_.Allocate(sizes.attended));
  HEADSTART_ASSIGN_OR_RETURN(gate_up_, backend_.Allocate(sizes.gate_up));
  HEADSTART_ASSIGN_OR_RETURN(activated_, backend_.Allocate(sizes.activated));
  HEADSTART_ASSIGN_OR_RETURN(logits_, backend_.Allocate(sizes.logits));
  HEADSTART_ASSIGN_OR_RETURN(flags_, backend_.Allocate(sizes.flags));
  host_logits_.resize(static_cast<size_t>(config_.vocab_size));
  return absl::OkStatus();
}

absl::Status Decoder::Embed(absl::Span<const DecoderInput> pieces) {
  const int64_t rows = RowsOf(pieces);
  HEADSTART_CHECK(rows <= max_rows_ && static_cast<int64_t>(pieces.size()) <= max_pieces_);
  ids_.clear();
  for (const DecoderInput& piece : pieces) {
    ids_.insert(ids_.end(), piece.token_ids.begin(), piece.token_ids.end());
  }
  const std::vector<std::byte> zeros(static_cast<size_t>(flags_.bytes()));
  HEADSTART_RETURN_IF_ERROR(backend_.Upload(zeros.data(), flags_.bytes(), flags_.data()));
  return backend_.Embed(ids_, weights_.embedding, Hidden(rows));
}

absl::Status Decoder::RunLayer(int32_t layer, absl::Span<const DecoderInput> pieces) {
  const LayerWeights& w = weights_.layers[layer];
  HEADSTART_RETURN_IF_ERROR(RunQkv(w, layer, pieces));
  HEADSTART_RETURN_IF_ERROR(RunAttention(layer, pieces));
  if (layer + 1 < config_.num_layers) return RunRest(w, 0, RowsOf(pieces));
  for (const RowRange& rows : RowsOfLastBlocks(pieces)) {
    HEADSTART_RETURN_IF_ERROR(RunRest(w, rows.begin, rows.end - rows.begin));
  }
  return absl::OkStatus();
}

// Q, K and V of the pieces; K and V go to the cache.
absl::Status Decoder::RunQkv(const LayerWeights& w, int32_t layer,
                             absl::Span<const DecoderInput> pieces) {
  const int64_t rows = RowsOf(pieces);
  const DType compute = backend_.compute_dtype();
  const Matrix normed = View(normed_, compute, rows, config_.hidden_size);
  const Matrix qkv = View(qkv_, compute, rows, config_.heads.qkv_cols());
  HEADSTART_RETURN_IF_ERROR(
      backend_.RmsNorm(Hidden(rows), w.input_norm, config_.rms_norm_eps, normed));
  HEADSTART_RETURN_IF_ERROR(backend_.Linear(*w.qkv, normed, qkv, LinearOutput::kStore));
  uint32_t* const flags = static_cast<uint32_t*>(flags_.data()) + layer * max_pieces_;
  std::vector<RopeSequence> sequences;
  int64_t row = 0;
  for (const DecoderInput& piece : pieces) {
    sequences.push_back({SequenceRowsOf(piece, row), flags + sequences.size()});
    row += piece.num_tokens();
  }
  RopeArgs rope;
  rope.qkv = qkv;
  rope.sequences = sequences;
  rope.rope = weights_.rope.get();
  rope.q_norm = config_.qk_norm ? &w.q_norm : nullptr;
  rope.k_norm = config_.qk_norm ? &w.k_norm : nullptr;
  rope.norm_eps = config_.rms_norm_eps;
  rope.kv = kv_.Layer(layer);
  return backend_.RopeAndStoreKv(rope);
}

// Attention of the pieces' rows that go on behind this layer.
absl::Status Decoder::RunAttention(int32_t layer, absl::Span<const DecoderInput> pieces) {
  const bool is_last = layer + 1 == config_.num_layers;
  std::vector<AttentionSequence> sequences;
  int64_t row = 0;
  for (const DecoderInput& piece : pieces) {
    AttentionSequence sequence;
    sequence.rows = SequenceRowsOf(piece, row);
    row += piece.num_tokens();
    if (is_last && !piece.ends_prompt) continue;
    if (is_last) sequence.rows = Behind(sequence.rows, RowsBeforeLastBlock(piece));
    sequence.proxy_attn = RunsDense(piece, layer) ? nullptr : piece.proxy_attn;
    sequence.ends_prompt = piece.ends_prompt;
    sequence.budget_ratio = piece.slot->budget_ratio(layer);
    sequence.counts = piece.slot->counts(layer);
    sequences.push_back(sequence);
  }
  if (sequences.empty()) return absl::OkStatus();
  const HeadShape& heads = config_.heads;
  const int64_t cols = int64_t{heads.num_heads} * heads.head_dim;
  AttentionArgs attention;
  attention.q = View(qkv_, backend_.compute_dtype(), row, heads.qkv_cols()).Cols(0, cols);
  attention.out = View(attended_, backend_.compute_dtype(), row, cols);
  attention.kv = kv_.Layer(layer);
  attention.sequences = sequences;
  return backend_.Attention(attention);
}

// What follows attention, of rows [first_row, first_row + num_rows).
absl::Status Decoder::RunRest(const LayerWeights& w, int64_t first_row, int64_t num_rows) {
  const DType compute = backend_.compute_dtype();
  const int64_t end = first_row + num_rows;
  const int64_t cols = int64_t{config_.heads.num_heads} * config_.heads.head_dim;
  const Matrix x = Hidden(end).Rows(first_row, num_rows);
  const Matrix attended = View(attended_, compute, end, cols).Rows(first_row, num_rows);
  const Matrix normed = View(normed_, compute, num_rows, config_.hidden_size);
  HEADSTART_RETURN_IF_ERROR(backend_.Linear(*w.output, attended, x, LinearOutput::kAdd));
  HEADSTART_RETURN_IF_ERROR(
      backend_.RmsNorm(x, w.post_attention_norm, config_.rms_norm_eps, normed));
  return RunFfn(w, x, normed);
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

const uint32_t* Decoder::not_finite(int32_t layer) const {
  return static_cast<const uint32_t*>(flags_.data()) + layer * max_pieces_;
}

absl::Status Decoder::RunHead(absl::Span<const DecoderInput> pieces) {
  const Matrix hidden = Hidden(RowsOf(pieces));
  const Matrix normed = View(normed_, backend_.compute_dtype(), max_rows_, config_.hidden_size);
  int64_t end = 0, prompts = 0;
  for (const DecoderInput& piece : pieces) {
    end += piece.num_tokens();
    if (!piece.ends_prompt) continue;
    HEADSTART_RETURN_IF_ERROR(backend_.RmsNorm(hidden.Rows(end - 1, 1), weights_.final_norm,
                                               config_.rms_norm_eps, normed.Rows(prompts++, 1)));
  }
  if (prompts == 0) return absl::OkStatus();
  return backend_.Linear(*weights_.lm_head, normed.Rows(0, prompts), LogitsOf(0, prompts),
                         LinearOutput::kStore);
}

absl::StatusOr<absl::Span<const float>> Decoder::Logits(int64_t prompt) {
  HEADSTART_RETURN_IF_ERROR(backend_.Download(
      LogitsOf(prompt, 1).data, config_.vocab_size * DTypeBytes(DType::kF32), host_logits_.data()));
  return absl::MakeConstSpan(host_logits_);
}

Matrix Decoder::LogitsOf(int64_t first_prompt, int64_t num_prompts) const {
  return Matrix{logits_.data(), DType::kF32, max_pieces_, config_.vocab_size, LogitsStride(config_)}
      .Rows(first_prompt, num_prompts);
}

Matrix Decoder::Hidden(int64_t rows) const {
  return View(hidden_, backend_.residual_dtype(), rows, config_.hidden_size);
}

}  // namespace headstart
