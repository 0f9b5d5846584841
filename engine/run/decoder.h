// The forward pass of a Llama or Qwen decoder over the rows of one sequence.
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
#include "kernels/backend.h"

namespace headstart {

// Tokens that go through the layers together: a piece of a prompt, or the last token of a sequence.
struct Chunk {
  absl::Span<const int32_t> token_ids;
  // Of the first token. A multiple of kBlockTokens, but for dense single tokens.
  int64_t first_position = 0;
  // The last token's logits are wanted; ProxyAttn's dense tail lies in this chunk.
  bool ends_prompt = true;
  // Null: dense attention.
  const ProxyAttnOptions* proxy_attn = nullptr;
};

// One sequence at a time. All activations are allocated by Create.
class Decoder {
 public:
  // Everything passed in must outlive the decoder. `max_rows`: most tokens of a chunk.
  static absl::StatusOr<std::unique_ptr<Decoder>> Create(const ModelConfig& config,
                                                         const ModelWeights& weights,
                                                         const KvCache& kv, int64_t max_rows,
                                                         Backend& backend);

  // Forgets the sequence before: heads start with a budget of zero.
  absl::Status StartSequence();
  // Loads a chunk's embeddings.
  absl::Status Embed(const Chunk& chunk);
  // Runs one layer over the embedded chunk; layers go in order. K and V of the chunk are in the
  // cache afterwards, where those of all tokens before it must be already.
  absl::Status RunLayer(int32_t layer, const Chunk& chunk);
  // Final norm and output projection of the chunk's last row, after the last layer of a chunk that
  // ends the prompt.
  absl::Status RunHead(const Chunk& chunk);
  // The logits that RunHead made: [vocab], valid until the next call.
  absl::StatusOr<absl::Span<const float>> Logits();
  // f32 [num_layers][H]: the heads' budget ratios after the chunks so far, see SelectArgs.
  const Buffer& budget_ratio() const { return budget_ratio_; }

 private:
  Decoder(const ModelConfig& config, const ModelWeights& weights, const KvCache& kv,
          Backend& backend)
      : config_(config), weights_(weights), kv_(kv), backend_(backend) {}

  absl::Status Allocate(int64_t max_rows);
  absl::Status RunQkv(const LayerWeights& w, int32_t layer, const Chunk& chunk);
  absl::Status RunAttention(int32_t layer, const Chunk& chunk, int64_t first_row, Matrix out);
  absl::Status RunFfn(const LayerWeights& w, Matrix x, Matrix normed);

  const ModelConfig& config_;
  const ModelWeights& weights_;
  const KvCache& kv_;
  Backend& backend_;

  Buffer hidden_;        // residual_dtype [max_rows, hidden]: the residual stream
  Buffer normed_;        // compute_dtype [max_rows, hidden]
  Buffer qkv_;           // compute_dtype [max_rows, (H + 2 H_kv) d]
  Buffer attended_;      // compute_dtype [max_rows, H d]
  Buffer gate_up_;       // compute_dtype [FFN slice, 2 ffn]
  Buffer activated_;     // compute_dtype [FFN slice, ffn]
  Buffer logits_;        // f32 [vocab]
  Buffer budget_ratio_;  // f32 [num_layers][H], see SelectArgs
  std::vector<float> host_logits_;
};

// Bytes of the activations that a decoder for chunks of `max_rows` tokens allocates.
int64_t ActivationBytes(const ModelConfig& config, DType compute_dtype, DType residual_dtype,
                        int64_t max_rows);

}  // namespace headstart
