#include "engine/engine.h"

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <filesystem>
#include <optional>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "engine/run/decoder.h"
#include "engine/run/kv_cache.h"
#include "engine/run/predicted_blocks.h"
#include "engine/ship/kv_export.h"
#include "engine/stopwatch.h"
#include "kernels/base/nonfinite.h"
#include "kernels/base/status_macros.h"

namespace headstart {

// Order matters: what lies in the backend's memory goes before the backend.
struct Engine::State {
  EngineOptions options;
  ModelConfig config;
  int64_t prompt_limit = 0;  // the model's, or the operator's; the pool may hold less
  std::unique_ptr<Backend> backend;
  ModelWeights weights;
  KvCache kv;
  std::unique_ptr<BlockPool> pool;
  std::unique_ptr<Decoder> decoder;
  std::atomic<int64_t> layers_done{0};

  absl::Status WarmUp();
  absl::Status RunChunk(const PrefillJob& job, const Chunk& chunk, KvExport& to_sink);
  absl::StatusOr<PrefillResult> Run(const PrefillJob& job, KvSink& sink);
  absl::StatusOr<std::vector<float>> BudgetRatios();
};

namespace {

std::string FolderName(const std::string& path) {
  const std::filesystem::path folder = std::filesystem::path(path).lexically_normal();
  return folder.has_filename() ? folder.filename().string()
                               : folder.parent_path().filename().string();
}

absl::Status BadOption(absl::string_view name, int64_t value, absl::string_view allowed) {
  return absl::InvalidArgumentError(absl::StrCat(name, "=", value, " is not ", allowed));
}

// Replaces the zeros in `options` by what they stand for.
absl::Status Resolve(const ModelConfig& config, EngineOptions& options) {
  if (options.model_name.empty()) options.model_name = FolderName(options.model_dir);
  if (options.chunk_tokens <= 0 || options.chunk_tokens % kBlockTokens != 0) {
    return BadOption("chunk_tokens", options.chunk_tokens,
                     absl::StrCat("a positive multiple of ", kBlockTokens));
  }
  if (options.max_prompt_tokens < 0 || options.max_prompt_tokens > config.max_positions) {
    return BadOption("max_prompt_tokens", options.max_prompt_tokens,
                     absl::StrCat("in [1, ", config.max_positions,
                                  "], the model's context, or 0 for all of it"));
  }
  // Page numbers are int32.
  constexpr int64_t kMaxPoolTokens = (int64_t{1} << 31) * kBlockTokens - kBlockTokens;
  if (options.kv_pool_tokens < 0 || options.kv_pool_tokens > kMaxPoolTokens) {
    return BadOption("kv_pool_tokens", options.kv_pool_tokens,
                     absl::StrCat("in [0, ", kMaxPoolTokens, "]"));
  }
  if (options.max_prompt_tokens == 0) options.max_prompt_tokens = config.max_positions;
  if (options.kv_pool_tokens == 0) options.kv_pool_tokens = options.max_prompt_tokens;
  options.kv_pool_tokens = NumBlocks(options.kv_pool_tokens) * kBlockTokens;
  return absl::OkStatus();
}

absl::Status CheckTokens(absl::Span<const int32_t> ids, int32_t vocab_size) {
  if (ids.empty()) return absl::InvalidArgumentError("token_ids is empty");
  for (size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] >= 0 && ids[i] < vocab_size) continue;
    return absl::InvalidArgumentError(absl::StrCat(
        "token_ids[", i, "]=", ids[i],
        ids[i] < 0 ? " is negative" : absl::StrCat(" is not below vocab_size ", vocab_size)));
  }
  return absl::OkStatus();
}

absl::Status CheckStillWanted(const PrefillJob& job, int32_t layer) {
  if (job.cancelled.load(std::memory_order_relaxed)) {
    return absl::CancelledError(absl::StrCat("cancelled before layer ", layer));
  }
  if (absl::Now() >= job.deadline) {
    return absl::DeadlineExceededError(absl::StrCat("deadline passed before layer ", layer));
  }
  return absl::OkStatus();
}

absl::Status CheckFits(const MemoryPlan& plan, const Backend& backend) {
  const std::optional<int64_t> free_bytes = backend.FreeBytes();
  if (!free_bytes.has_value() || plan.total_bytes() <= *free_bytes) return absl::OkStatus();
  return absl::ResourceExhaustedError(absl::StrCat(
      "the model needs ", plan.total_bytes(), " bytes (weights ", plan.weight_bytes, ", KV pool ",
      plan.kv_pool_bytes, ", activations ", plan.workspace_bytes, ", scratch ", plan.scratch_bytes,
      "), the device has ", *free_bytes, " free: ", plan.total_bytes() - *free_bytes,
      " are missing; less kv_pool_tokens, max_prompt_tokens or chunk_tokens need less"));
}

void AddStats(const BackendStats& stats, absl::Span<const int64_t> predicted_blocks,
              PrefillResult& result) {
  for (const LayerStats& layer : stats.layers) {
    const int64_t predicted = predicted_blocks[result.layer_predicted_blocks.size()];
    result.layer_predicted_blocks.push_back(predicted > 0 ? predicted : layer.executed_blocks);
    result.layer_density.push_back(layer.causal_blocks == 0
                                       ? 1.0f
                                       : static_cast<float>(layer.executed_blocks) /
                                             static_cast<float>(layer.causal_blocks));
    result.layer_executed_blocks.push_back(layer.executed_blocks);
    result.layer_causal_blocks.push_back(layer.causal_blocks);
    result.executed_blocks += layer.executed_blocks;
    result.causal_blocks += layer.causal_blocks;
    result.dense_fallbacks += layer.dense_fallbacks;
  }
  result.selection_seconds = stats.selection_seconds;
  result.attention_seconds = stats.attention_seconds;
}

}  // namespace

absl::StatusOr<MemoryPlan> Engine::Plan(const EngineOptions& options, const Backend& backend) {
  HEADSTART_ASSIGN_OR_RETURN(const ModelConfig config, ReadModelConfig(options.model_dir));
  EngineOptions resolved = options;
  HEADSTART_RETURN_IF_ERROR(Resolve(config, resolved));
  MemoryPlan plan =
      PlanMemory(config, backend.compute_dtype(), resolved.chunk_tokens, resolved.kv_pool_tokens);
  const int64_t longest = std::min(resolved.max_prompt_tokens, resolved.kv_pool_tokens);
  plan.scratch_bytes =
      backend.PlanScratchBytes(config.heads, std::min(resolved.chunk_tokens, longest), longest);
  HEADSTART_RETURN_IF_ERROR(CheckFits(plan, backend));
  return plan;
}

absl::StatusOr<std::unique_ptr<Engine>> Engine::Create(const EngineOptions& options,
                                                       const LoadProgress& progress) {
  // The model first: what is wrong with it is said before a device is touched.
  HEADSTART_RETURN_IF_ERROR(ReadModelConfig(options.model_dir).status());
  HEADSTART_ASSIGN_OR_RETURN(std::unique_ptr<Backend> backend, MakeBackend(options.backend));
  return Create(options, std::move(backend), progress);
}

absl::StatusOr<std::unique_ptr<Engine>> Engine::Create(const EngineOptions& options,
                                                       std::unique_ptr<Backend> backend,
                                                       const LoadProgress& progress) {
  HEADSTART_RETURN_IF_ERROR(Plan(options, *backend).status());
  auto state = std::make_unique<State>();
  state->options = options;
  state->backend = std::move(backend);
  HEADSTART_ASSIGN_OR_RETURN(state->config, ReadModelConfig(options.model_dir));
  HEADSTART_RETURN_IF_ERROR(Resolve(state->config, state->options));
  EngineOptions& resolved = state->options;
  state->prompt_limit = resolved.max_prompt_tokens;
  resolved.max_prompt_tokens = std::min(resolved.max_prompt_tokens, resolved.kv_pool_tokens);

  HEADSTART_ASSIGN_OR_RETURN(const auto files, WeightFiles::Open(options.model_dir));
  HEADSTART_ASSIGN_OR_RETURN(state->weights, LoadWeights(state->config, *files, *state->backend,
                                                         resolved.max_prompt_tokens, progress));
  const int64_t num_pages = resolved.kv_pool_tokens / kBlockTokens;
  HEADSTART_ASSIGN_OR_RETURN(state->kv, KvCache::Create(state->config, num_pages, *state->backend));
  state->pool = std::make_unique<BlockPool>(num_pages);
  const int64_t max_rows = std::min(resolved.chunk_tokens, resolved.max_prompt_tokens);
  HEADSTART_ASSIGN_OR_RETURN(state->decoder, Decoder::Create(state->config, state->weights,
                                                             state->kv, max_rows, *state->backend));
  HEADSTART_RETURN_IF_ERROR(
      state->backend->ReserveScratch(state->config.heads, max_rows, resolved.max_prompt_tokens));
  if (state->backend->LearnsShapes()) HEADSTART_RETURN_IF_ERROR(state->WarmUp());
  return std::unique_ptr<Engine>(new Engine(std::move(state)));
}

Engine::Engine(std::unique_ptr<State> state) : state_(std::move(state)) {}
Engine::~Engine() = default;

absl::Status Engine::Validate(const PrefillJob& job) const {
  HEADSTART_RETURN_IF_ERROR(CheckTokens(job.token_ids, state_->config.vocab_size));
  const auto num_tokens = static_cast<int64_t>(job.token_ids.size());
  if (num_tokens > state_->prompt_limit) {
    return absl::InvalidArgumentError(
        absl::StrCat("token_ids has ", num_tokens, " ids, limit ", state_->prompt_limit));
  }
  if (num_tokens > state_->options.kv_pool_tokens) {
    return absl::FailedPreconditionError(absl::StrCat(
        "token_ids has ", num_tokens, " ids, the KV pool holds ", state_->options.kv_pool_tokens));
  }
  HEADSTART_RETURN_IF_ERROR(ValidateAttentionOptions(job.attention, state_->config.heads));
  for (const int32_t layer : job.attention.dense_layers) {
    if (layer < state_->config.num_layers) continue;
    return absl::InvalidArgumentError(absl::StrCat("attention.dense_layers=", layer,
                                                   " is not below the ", state_->config.num_layers,
                                                   " layers"));
  }
  return ValidateSamplingOptions(job.sampling);
}

absl::StatusOr<PrefillResult> Engine::RunPrefill(const PrefillJob& job, KvSink& sink) {
  HEADSTART_RETURN_IF_ERROR(Validate(job));
  return state_->Run(job, sink);
}

absl::StatusOr<PrefillResult> Engine::State::Run(const PrefillJob& job, KvSink& sink) {
  const Stopwatch total;
  const auto num_tokens = static_cast<int64_t>(job.token_ids.size());
  HEADSTART_ASSIGN_OR_RETURN(const BlockLease pages, pool->Acquire(NumBlocks(num_tokens)));
  HEADSTART_RETURN_IF_ERROR(kv.Bind(pages.pages(), *backend));
  HEADSTART_RETURN_IF_ERROR(decoder->StartSequence());
  backend->ResetStats(config.num_layers);
  HEADSTART_RETURN_IF_ERROR(sink.OnStart());

  KvExport to_sink(*backend, sink);
  Chunk chunk;
  chunk.proxy_attn = job.attention.enabled ? &job.attention : nullptr;
  for (int64_t begin = 0; begin < num_tokens; begin += options.chunk_tokens) {
    const int64_t count = std::min(options.chunk_tokens, num_tokens - begin);
    chunk.token_ids = absl::MakeConstSpan(job.token_ids).subspan(begin, count);
    chunk.first_position = begin;
    chunk.ends_prompt = begin + count == num_tokens;
    HEADSTART_RETURN_IF_ERROR(RunChunk(job, chunk, to_sink));
  }
  HEADSTART_RETURN_IF_ERROR(to_sink.Flush());
  HEADSTART_ASSIGN_OR_RETURN(const absl::Span<const float> logits, decoder->Logits());
  PrefillResult result;
  HEADSTART_ASSIGN_OR_RETURN(result.first_token, SampleToken(logits, job.sampling));
  HEADSTART_ASSIGN_OR_RETURN(const BackendStats stats, backend->ReadStats());
  HEADSTART_ASSIGN_OR_RETURN(const std::vector<float> budget_ratios, BudgetRatios());
  AddStats(stats,
           PredictedBlocks(budget_ratios, config.heads.num_heads, num_tokens,
                           job.attention.floor_tokens),
           result);
  result.sink_seconds = to_sink.sink_seconds();
  result.total_seconds = total.seconds();
  return result;
}

// Of the sequence that ran last; all 0 when it was dense.
absl::StatusOr<std::vector<float>> Engine::State::BudgetRatios() {
  const Buffer& source = decoder->budget_ratio();
  std::vector<float> ratios(static_cast<size_t>(source.bytes()) / sizeof(float));
  HEADSTART_RETURN_IF_ERROR(backend->Download(source.data(), source.bytes(), ratios.data()));
  return ratios;
}

// All layers of one chunk, and the head where the prompt ends.
absl::Status Engine::State::RunChunk(const PrefillJob& job, const Chunk& chunk, KvExport& to_sink) {
  const auto num_tokens = static_cast<int64_t>(chunk.token_ids.size());
  HEADSTART_RETURN_IF_ERROR(CheckStillWanted(job, /*layer=*/0));
  HEADSTART_RETURN_IF_ERROR(decoder->Embed(chunk));
  for (int32_t layer = 0; layer < config.num_layers; ++layer) {
    HEADSTART_RETURN_IF_ERROR(CheckStillWanted(job, layer));
    HEADSTART_RETURN_IF_ERROR(decoder->RunLayer(layer, chunk));
    if (chunk.ends_prompt && layer + 1 == config.num_layers) {
      HEADSTART_RETURN_IF_ERROR(decoder->RunHead(chunk));
    }
    HEADSTART_RETURN_IF_ERROR(
        to_sink.ExportLayer(layer, kv.Layer(layer), chunk.first_position, num_tokens));
    layers_done.fetch_add(1, std::memory_order_relaxed);
  }
  return absl::OkStatus();
}

// Runs prompts of every size that the backend tells apart.
absl::Status Engine::State::WarmUp() {
  DiscardingSink sink;
  PrefillJob job;
  for (int64_t rows = std::min(options.chunk_tokens, options.max_prompt_tokens); rows > 0;
       rows /= 2) {
    job.token_ids.assign(static_cast<size_t>(rows), 0);
    const absl::Status status = Run(job, sink).status();
    if (!status.ok() && !IsNonFiniteError(status)) return status;
  }
  return absl::OkStatus();
}

const EngineOptions& Engine::options() const { return state_->options; }
const ModelConfig& Engine::config() const { return state_->config; }
const std::string& Engine::model_hash() const { return state_->weights.model_hash; }
const Backend& Engine::backend() const { return *state_->backend; }
const BlockPool& Engine::block_pool() const { return *state_->pool; }
DType Engine::kv_dtype() const { return state_->backend->compute_dtype(); }
int64_t Engine::layers_done() const { return state_->layers_done.load(std::memory_order_relaxed); }

}  // namespace headstart
