// The forward pass of a Llama or Qwen decoder over rows of one sequence or several.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "engine/model/model_config.h"
#include "engine/model/weights.h"
#include "engine/run/kv_cache.h"
#include "engine/run/request_slot.h"
#include "kernels/backend.h"

namespace headstart {

// Tokens of one request that go through the layers together: a part of its prompt, or the last
// token of a sequence.
struct DecoderInput {
  absl::Span<const int32_t> token_ids;  // some
  // Of the first token. A multiple of kBlockTokens, but for dense single tokens.
  int64_t first_position = 0;
  // The last token's logits are wanted; ProxyAttn's dense tail lies in this piece.
  bool ends_prompt = true;
  // Null: dense attention.
  const ProxyAttnOptions* proxy_attn = nullptr;
  const RequestSlot* slot = nullptr;

  int64_t num_tokens() const { return static_cast<int64_t>(token_ids.size()); }
};

// All activations are allocated by Create. What a piece gets does not depend on the others that run
// with it, if the backend's products do not (kernels/README.md).
class Decoder {
 public:
  // Everything passed in must outlive the decoder. Pieces that run together: `max_pieces` at most,
  // of `max_rows` tokens in all.
  static absl::StatusOr<std::unique_ptr<Decoder>> Create(const ModelConfig& config,
                                                         const ModelWeights& weights,
                                                         const KvCache& kv, int64_t max_rows,
                                                         int64_t max_pieces, Backend& backend);

  // Loads the pieces' embeddings, in one go, and forgets what was not finite. The same pieces then
  // go to RunLayer, for one layer after the other, and to RunHead.
  absl::Status Embed(absl::Span<const DecoderInput> pieces);
  // Runs one layer. The pieces' K and V are in the cache afterwards, where those of all tokens
  // before them must be already.
  absl::Status RunLayer(int32_t layer, absl::Span<const DecoderInput> pieces);
  // Backend memory [pieces]: 1 for a piece whose K or V of that layer is not finite, else 0.
  const uint32_t* not_finite(int32_t layer) const;
  // Final norm and output projection of the last row of every piece that ends its prompt, of all
  // together.
  absl::Status RunHead(absl::Span<const DecoderInput> pieces);
  // The logits that RunHead made of such a piece, counted in their order: [vocab], valid until the
  // next call.
  absl::StatusOr<absl::Span<const float>> Logits(int64_t prompt);

 private:
  Decoder(const ModelConfig& config, const ModelWeights& weights, const KvCache& kv,
          int64_t max_rows, int64_t max_pieces, Backend& backend)
      : config_(config),
        weights_(weights),
        kv_(kv),
        max_rows_(max_rows),
        max_pieces_(max_pieces),
        backend_(backend) {}

  absl::Status Allocate();
  absl::Status RunQkv(const LayerWeights& w, int32_t layer, absl::Span<const DecoderInput> pieces);
  absl::Status RunAttention(int32_t layer, absl::Span<const DecoderInput> pieces);
  absl::Status RunRest(const LayerWeights& w, int64_t first_row, int64_t num_rows);
  absl::Status RunFfn(const LayerWeights& w, Matrix x, Matrix normed);
  Matrix Hidden(int64_t rows) const;
  Matrix LogitsOf(int64_t first_prompt, int64_t num_prompts) const;

  const ModelConfig& config_;
  const ModelWeights& weights_;
  const KvCache& kv_;
  const int64_t max_rows_;
  const int64_t max_pieces_;
  Backend& backend_;

  Buffer hidden_;     // residual_dtype [max_rows, hidden]: the residual stream
  Buffer normed_;     // compute_dtype [max_rows, hidden]
  Buffer qkv_;        // compute_dtype [max_rows, (H + 2 H_kv) d]
  Buffer attended_;   // compute_dtype [max_rows, H d]
  Buffer gate_up_;    // compute_dtype [FFN slice, 2 ffn]
  Buffer activated_;  // compute_dtype [FFN slice, ffn]
  Buffer logits_;     // f32 [max_pieces, vocab]
  Buffer flags_;      // u32 [num_layers][max_pieces], see not_finite
  std::vector<int32_t> ids_;
  std::vector<float> host_logits_;
};

// Bytes of the activations that a decoder allocates.
int64_t ActivationBytes(const ModelConfig& config, DType compute_dtype, DType residual_dtype,
                        int64_t max_rows, int64_t max_pieces);

}  // namespace headstart
