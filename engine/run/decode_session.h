// Goes on from KV that was made elsewhere: the compute side of a decode node.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "engine/model/model_config.h"
#include "engine/model/weights.h"
#include "engine/run/sampling.h"
#include "kernels/backend.h"

namespace headstart {

struct DecodeOptions {
  std::string model_dir;
  Links links = Links::kInside;
  BackendOptions backend;
  int64_t max_tokens = 0;  // prompt and generated ones; 0: the model's context
};

// One sequence at a time, on one thread at a time. Attention is dense.
class DecodeSession {
 public:
  // The same checks and errors as Engine::Create.
  static absl::StatusOr<std::unique_ptr<DecodeSession>> Create(const DecodeOptions& options,
                                                               const LoadProgress& progress);
  // With a backend of the caller's: tests.
  static absl::StatusOr<std::unique_ptr<DecodeSession>> Create(const DecodeOptions& options,
                                                               std::unique_ptr<Backend> backend,
                                                               const LoadProgress& progress);
  ~DecodeSession();

  // Begins a sequence whose first `num_tokens` tokens come by ImportLayer, once for every layer.
  // INVALID_ARGUMENT when there is no room for them.
  absl::Status StartSequence(int64_t num_tokens);
  // K and V of the sequence's tokens, each C-contiguous [num_kv_heads][num_tokens][head_dim] of
  // kv_dtype(), K after RoPE. Copied. INVALID_ARGUMENT when a size is wrong.
  absl::Status ImportLayer(int32_t layer, absl::Span<const std::byte> keys,
                           absl::Span<const std::byte> values);

  // Runs `token_id` at the next position and says which token follows it, greedily.
  // FAILED_PRECONDITION while layers are missing, OUT_OF_RANGE when max_tokens are reached.
  absl::StatusOr<SampledToken> Step(int32_t token_id);
  // Of the last Step: [vocab_size].
  absl::Span<const float> logits() const;

  int64_t num_tokens() const;  // of the sequence so far
  int64_t max_tokens() const;
  const ModelConfig& config() const;
  const std::string& model_hash() const;
  const Backend& backend() const;
  DType kv_dtype() const;

 private:
  struct State;
  explicit DecodeSession(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace headstart
