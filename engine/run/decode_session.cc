#include "engine/run/decode_session.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <optional>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/run/decoder.h"
#include "engine/run/kv_cache.h"
#include "engine/run/request_slot.h"
#include "kernels/base/status_macros.h"

namespace headstart {

// Order matters: what lies in the backend's memory goes before the backend.
struct DecodeSession::State {
  ModelConfig config;
  int64_t max_tokens = 0;
  std::unique_ptr<Backend> backend;
  ModelWeights weights;
  KvCache kv;
  std::optional<RequestSlot> slot;
  std::unique_ptr<Decoder> decoder;
  int64_t num_tokens = 0;
  std::vector<bool> has_layer;
  absl::Span<const float> logits;

  absl::Status ImportPage(const KvPages& pages, int64_t page, absl::Span<const std::byte> keys,
                          absl::Span<const std::byte> values);
};

absl::StatusOr<std::unique_ptr<DecodeSession>> DecodeSession::Create(const DecodeOptions& options,
                                                                     const LoadProgress& progress) {
  HEADSTART_RETURN_IF_ERROR(ReadModelConfig(options.model_dir, options.links).status());
  HEADSTART_ASSIGN_OR_RETURN(std::unique_ptr<Backend> backend, MakeBackend(options.backend));
  return Create(options, std::move(backend), progress);
}

absl::StatusOr<std::unique_ptr<DecodeSession>> DecodeSession::Create(
    const DecodeOptions& options, std::unique_ptr<Backend> backend, const LoadProgress& progress) {
  auto state = std::make_unique<State>();
  state->backend = std::move(backend);
  HEADSTART_ASSIGN_OR_RETURN(state->config, ReadModelConfig(options.model_dir, options.links));
  const ModelConfig& config = state->config;
  HEADSTART_RETURN_IF_ERROR(
      state->backend->CheckModel({config.heads, config.hidden_size, config.intermediate_size}));
  if (options.max_tokens < 0 || options.max_tokens > config.max_positions) {
    return absl::InvalidArgumentError(absl::StrCat("max_tokens=", options.max_tokens,
                                                   " is not in [0, ", config.max_positions,
                                                   "], the model's context"));
  }
  state->max_tokens = options.max_tokens == 0 ? config.max_positions : options.max_tokens;
  HEADSTART_ASSIGN_OR_RETURN(const auto files, WeightFiles::Open(options.model_dir, options.links));
  HEADSTART_ASSIGN_OR_RETURN(
      state->weights, LoadWeights(config, *files, *state->backend, state->max_tokens, progress,
                                  options.backend.num_threads));
  const int64_t num_pages = NumBlocks(state->max_tokens);
  HEADSTART_ASSIGN_OR_RETURN(state->kv, KvCache::Create(config, num_pages, *state->backend));
  HEADSTART_ASSIGN_OR_RETURN(state->slot, RequestSlot::Create(config, num_pages, *state->backend));
  HEADSTART_ASSIGN_OR_RETURN(state->decoder,
                             Decoder::Create(config, state->weights, state->kv, /*max_rows=*/1,
                                             /*max_pieces=*/1, *state->backend));
  std::unique_ptr<DecodeSession> session(new DecodeSession(std::move(state)));
  HEADSTART_RETURN_IF_ERROR(session->StartSequence(0));
  return session;
}

DecodeSession::DecodeSession(std::unique_ptr<State> state) : state_(std::move(state)) {}
DecodeSession::~DecodeSession() = default;

absl::Status DecodeSession::StartSequence(int64_t num_tokens) {
  if (num_tokens < 0 || num_tokens > state_->max_tokens) {
    return absl::InvalidArgumentError(
        absl::StrCat("num_tokens=", num_tokens, " is not in [0, ", state_->max_tokens, "]"));
  }
  state_->num_tokens = num_tokens;
  // An empty sequence lacks nothing.
  state_->has_layer.assign(static_cast<size_t>(state_->config.num_layers), num_tokens == 0);
  state_->logits = {};
  HEADSTART_RETURN_IF_ERROR(state_->backend->TakeTimes().status());  // forgets them
  // There is one sequence only: it has all pages, in order.
  std::vector<int32_t> pages(static_cast<size_t>(NumBlocks(state_->max_tokens)));
  std::iota(pages.begin(), pages.end(), 0);
  return state_->slot->Start(pages, nullptr);
}

absl::Status DecodeSession::ImportLayer(int32_t layer, absl::Span<const std::byte> keys,
                                        absl::Span<const std::byte> values) {
  const ModelConfig& config = state_->config;
  if (layer < 0 || layer >= config.num_layers) {
    return absl::InvalidArgumentError(
        absl::StrCat("layer=", layer, " is not in [0, ", config.num_layers, ")"));
  }
  const int64_t bytes = int64_t{config.heads.num_kv_heads} * state_->num_tokens *
                        config.heads.head_dim * DTypeBytes(kv_dtype());
  if (static_cast<int64_t>(keys.size()) != bytes || static_cast<int64_t>(values.size()) != bytes) {
    return absl::InvalidArgumentError(absl::StrCat("K of ", keys.size(), " and V of ",
                                                   values.size(), " bytes in layer ", layer,
                                                   ", each must have ", bytes));
  }
  const KvPages pages = state_->kv.Layer(layer);
  for (int64_t page = 0; page < NumBlocks(state_->num_tokens); ++page) {
    HEADSTART_RETURN_IF_ERROR(state_->ImportPage(pages, page, keys, values));
  }
  state_->has_layer[static_cast<size_t>(layer)] = true;
  return absl::OkStatus();
}

// Brings one page's tokens of all heads into the page's order and uploads it. What a last page does
// not fill is zero until Step writes it.
absl::Status DecodeSession::State::ImportPage(const KvPages& pages, int64_t page,
                                              absl::Span<const std::byte> keys,
                                              absl::Span<const std::byte> values) {
  const int64_t row_bytes = config.heads.head_dim * DTypeBytes(pages.dtype);
  const int64_t first = page * kBlockTokens;
  const int64_t count = std::min(kBlockTokens, num_tokens - first);
  std::vector<std::byte> staged(static_cast<size_t>(kv.page_bytes()));
  std::byte* target = staged.data();
  for (const absl::Span<const std::byte> plane : {keys, values}) {
    for (int32_t head = 0; head < config.heads.num_kv_heads; ++head) {
      std::memcpy(target, plane.data() + (head * num_tokens + first) * row_bytes,
                  static_cast<size_t>(count * row_bytes));
      target += kBlockTokens * row_bytes;
    }
  }
  return backend->Upload(staged.data(), kv.page_bytes(),
                         static_cast<std::byte*>(pages.pages) + page * kv.page_bytes());
}

absl::StatusOr<SampledToken> DecodeSession::Step(int32_t token_id) {
  State& s = *state_;
  if (token_id < 0 || token_id >= s.config.vocab_size) {
    return absl::InvalidArgumentError(
        absl::StrCat("token_id=", token_id, " is not in [0, ", s.config.vocab_size, ")"));
  }
  const auto missing = std::find(s.has_layer.begin(), s.has_layer.end(), false);
  if (missing != s.has_layer.end()) {
    return absl::FailedPreconditionError(
        absl::StrCat("layer ", missing - s.has_layer.begin(), " was not imported"));
  }
  if (s.num_tokens >= s.max_tokens) {
    return absl::OutOfRangeError(absl::StrCat("the sequence has max_tokens=", s.max_tokens));
  }
  DecoderInput piece;
  piece.token_ids = absl::MakeConstSpan(&token_id, 1);
  piece.first_position = s.num_tokens;
  piece.slot = &*s.slot;
  const absl::Span<const DecoderInput> pieces(&piece, 1);
  HEADSTART_RETURN_IF_ERROR(s.decoder->Embed(pieces));
  for (int32_t layer = 0; layer < s.config.num_layers; ++layer) {
    HEADSTART_RETURN_IF_ERROR(s.decoder->RunLayer(layer, pieces));
  }
  HEADSTART_RETURN_IF_ERROR(s.decoder->RunHead(pieces));
  HEADSTART_ASSIGN_OR_RETURN(s.logits, s.decoder->Logits(/*prompt=*/0));
  ++s.num_tokens;
  return SampleToken(s.logits, SamplingOptions{});
}

absl::Span<const float> DecodeSession::logits() const { return state_->logits; }
int64_t DecodeSession::num_tokens() const { return state_->num_tokens; }
int64_t DecodeSession::max_tokens() const { return state_->max_tokens; }
const ModelConfig& DecodeSession::config() const { return state_->config; }
const std::string& DecodeSession::model_hash() const { return state_->weights.model_hash; }
const Backend& DecodeSession::backend() const { return *state_->backend; }
DType DecodeSession::kv_dtype() const { return state_->backend->compute_dtype(); }

}  // namespace headstart
