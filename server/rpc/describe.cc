#include "server/rpc/describe.h"

#include <openssl/sha.h>

#include <bit>
#include <string>
#include <vector>

#include "engine/error.h"
#include "kernels/base/instant.h"
#include "server/rpc/call_record.h"
#include "server/rpc/convert.h"
#include "server/version.h"

namespace headstart {
namespace {

constexpr absl::Duration kLongestDuration = absl::Seconds(315'576'000'000);

v1::AttentionPreset ToProto(AttentionPreset preset) {
  switch (preset) {
    case AttentionPreset::kExact:
      return v1::ATTENTION_PRESET_EXACT;
    case AttentionPreset::kPaper:
      return v1::ATTENTION_PRESET_PAPER;
    case AttentionPreset::kBalanced:
      return v1::ATTENTION_PRESET_BALANCED;
    case AttentionPreset::kFast:
      return v1::ATTENTION_PRESET_FAST;
  }
  return v1::ATTENTION_PRESET_UNSPECIFIED;
}

v1::BudgetRule ToProto(BudgetRule rule) {
  switch (rule) {
    case BudgetRule::kOwn:
      return v1::BUDGET_RULE_OWN;
    case BudgetRule::kShared:
      return v1::BUDGET_RULE_SHARED;
    case BudgetRule::kRow:
      return v1::BUDGET_RULE_ROW;
  }
  return v1::BUDGET_RULE_UNSPECIFIED;
}

v1::AttentionOptions ToProto(const ResolvedAttention& attention) {
  v1::AttentionOptions out;
  out.set_preset(ToProto(attention.preset));
  const ProxyAttnOptions& options = attention.options;
  if (!options.enabled) return out;
  out.set_num_proxies(options.num_proxies);
  out.set_stride(options.stride);
  out.set_budget(ToProto(options.budget));
  out.set_gamma(options.gamma);
  out.set_floor_tokens(options.floor_tokens);
  out.set_sink_blocks(options.sink_blocks);
  out.set_local_blocks(options.local_blocks);
  out.set_dense_tail_blocks(options.dense_tail_blocks);
  out.set_dense_below_tokens(options.dense_below_tokens);
  return out;
}

v1::AttentionProvenance ToProvenance(const PrefillRequest& request) {
  v1::AttentionProvenance out;
  const bool below_limit = IsBelowDenseLimit(request);
  out.set_algorithm(request.attention.enabled && !below_limit
                        ? v1::AttentionProvenance::ALGORITHM_PROXY_ATTN
                        : v1::AttentionProvenance::ALGORITHM_DENSE);
  if (below_limit) {
    out.set_dense_reason(v1::AttentionProvenance::DENSE_REASON_BELOW_DENSE_LIMIT);
  }
  *out.mutable_options() = ToProto(ResolvedAttention{request.preset, request.attention});
  return out;
}

v1::KvLayout ToLayout(const Engine& engine, DType dtype) {
  const ModelConfig& config = engine.config();
  v1::KvLayout out;
  out.set_num_layers(config.num_layers);
  out.set_num_kv_heads(config.heads.num_kv_heads);
  out.set_head_dim(config.heads.head_dim);
  out.set_dtype(ToKvDtype(dtype));
  out.set_block_tokens(kBlockTokens);
  out.mutable_rope()->set_theta(config.rope.theta);
  out.mutable_rope()->set_type(std::string(RopeTypeName(config.rope.type)));
  out.mutable_rope()->set_factor(config.rope.factor);
  return out;
}

std::string TokenHash(const std::vector<int32_t>& token_ids) {
  static_assert(std::endian::native == std::endian::little, "ids are hashed as they lie in memory");
  std::string hash(SHA256_DIGEST_LENGTH, '\0');
  SHA256(reinterpret_cast<const unsigned char*>(token_ids.data()),
         token_ids.size() * sizeof(token_ids[0]), reinterpret_cast<unsigned char*>(hash.data()));
  return hash;
}

void FillPrefix(const PrefillResult& result, v1::KvManifest* out) {
  out->set_page_hashes(result.page_hashes);
  out->set_cached_tokens(static_cast<uint32_t>(result.cached_tokens));
  if (result.cached_tokens == 0) return;
  out->set_cached_algorithm(out->cache_root().has_attention()
                                ? v1::AttentionProvenance::ALGORITHM_PROXY_ATTN
                                : v1::AttentionProvenance::ALGORITHM_DENSE);
}

void FillTimes(const PrefillResult& result, Instant now, v1::PrefillStatistics* out) {
  const TimeShares shares = ShareTime(result, now);
  SetDuration(shares.queue, out->mutable_queue());
  SetDuration(shares.selection, out->mutable_selection());
  SetDuration(shares.attention, out->mutable_attention());
  SetDuration(shares.other_compute, out->mutable_other_compute());
  SetDuration(shares.exposed_transfer, out->mutable_exposed_transfer());
  SetDuration(shares.gave_way, out->mutable_gave_way());
  SetDuration(now - result.accepted_at, out->mutable_total());
  if (result.predicted_ttft.has_value()) {
    SetDuration(*result.predicted_ttft, out->mutable_predicted());
  }
}

}  // namespace

v1::KvDtype ToKvDtype(DType dtype) {
  switch (dtype) {
    case DType::kBF16:
      return v1::KV_DTYPE_BF16;
    case DType::kF16:
      return v1::KV_DTYPE_F16;
    case DType::kF32:
      return v1::KV_DTYPE_F32;
    case DType::kF8E4M3:
      return v1::KV_DTYPE_FP8_E4M3;
    case DType::kI32:
      break;
  }
  return v1::KV_DTYPE_UNSPECIFIED;
}

v1::CacheRoot ToCacheRoot(const std::string& salt, const PrefillRequest* request,
                          const ServedModel& model) {
  v1::CacheRoot out;
  out.set_salt(salt);
  if (request == nullptr) return out;
  *out.mutable_attention() = ToProto(ResolvedAttention{request->preset, request->attention});
  out.mutable_attention()->clear_preset();
  out.set_piece_tokens(static_cast<uint32_t>(model.engine->options().piece_tokens));
  out.set_dense_above_density(request->attention.dense_above_density);
  for (const int32_t layer : request->attention.dense_layers) {
    out.add_dense_layers(static_cast<uint32_t>(layer));
  }
  return out;
}

v1::EstimateResponse ToEstimate(const Estimate& estimate) {
  v1::EstimateResponse out;
  if (estimate.queue.has_value()) {
    SetDuration(*estimate.ttft(), out.mutable_predicted_ttft());
    SetDuration(*estimate.queue, out.mutable_predicted_queue());
    SetDuration(*estimate.compute, out.mutable_predicted_compute());
  }
  out.set_cached_tokens(static_cast<uint32_t>(estimate.cached_tokens));
  out.set_queue_requests(static_cast<uint32_t>(estimate.requests_ahead));
  out.set_queue_tokens(static_cast<uint64_t>(estimate.tokens_ahead));
  if (estimate.refusal.ok()) return out;
  out.set_refusal(static_cast<v1::ErrorReason>(ReasonOf(estimate.refusal)));
  if (const std::optional<absl::Duration> retry = RetryAfter(estimate.refusal)) {
    SetDuration(*retry, out.mutable_retry_after());
  }
  return out;
}

v1::GetLoadsResponse ToLoads(const ServedModel& model) {
  const Engine& engine = *model.engine;
  const SchedulerLoad load = engine.load();
  const PagePool& pages = engine.page_pool();
  const HostPages& host = engine.host_pages();
  v1::GetLoadsResponse out;
  out.set_model(model.name);
  out.set_accepting(engine.CheckOpen().ok());
  out.set_queued_requests(static_cast<uint32_t>(load.queued_requests));
  out.set_queued_tokens(static_cast<uint64_t>(load.queued_tokens));
  out.set_inflight_requests(static_cast<uint32_t>(load.inflight_requests));
  out.set_inflight_tokens(static_cast<uint64_t>(load.inflight_tokens));
  out.set_max_requests(static_cast<uint32_t>(model.options->max_queue_requests));
  out.set_max_tokens(static_cast<uint64_t>(model.options->max_queue_tokens));
  if (const std::optional<absl::Duration> drain = engine.PredictDrain()) {
    SetDuration(*drain, out.mutable_predicted_drain());
  }
  out.set_tokens_per_second(engine.TokensPerSecond().value_or(0));
  out.set_kv_pool_tokens(static_cast<uint64_t>(pages.num_pages() * kBlockTokens));
  out.set_kv_pool_used_tokens(
      static_cast<uint64_t>((pages.num_pages() - pages.free_pages()) * kBlockTokens));
  out.set_kv_pool_cached_tokens(static_cast<uint64_t>(pages.cached_pages() * kBlockTokens));
  out.set_host_kv_bytes(static_cast<uint64_t>(host.num_chunks() * host.chunk_bytes()));
  out.set_host_kv_used_bytes(
      static_cast<uint64_t>((host.num_chunks() - host.free_chunks()) * host.chunk_bytes()));
  out.set_leases(static_cast<uint32_t>(load.leases));
  out.set_prompt_tokens_total(static_cast<uint64_t>(load.prompt_tokens));
  out.set_cached_tokens_total(static_cast<uint64_t>(load.cached_tokens));
  return out;
}

v1::KvManifest ToManifest(const PrefillRequest& request, const ServedModel& model) {
  v1::KvManifest out;
  out.set_model(model.name);
  out.set_model_hash(model.engine->model_hash());
  out.set_token_hash(TokenHash(request.token_ids));
  out.set_num_tokens(static_cast<uint32_t>(request.num_tokens()));
  *out.mutable_layout() =
      ToLayout(*model.engine, request.kv_dtype.value_or(model.engine->geometry().dtype));
  *out.mutable_attention() = ToProvenance(request);
  out.set_skip_tokens(static_cast<uint32_t>(request.skip_tokens));
  if (request.prefix.cache_root.has_value()) {
    out.mutable_cache_root()->ParseFromString(*request.prefix.cache_root);
  }
  return out;
}

v1::Completed ToCompleted(const v1::KvManifest& manifest, const PrefillResult& result,
                          Instant now) {
  v1::Completed out;
  out.mutable_first_token()->set_id(static_cast<uint32_t>(result.first_token.id));
  out.mutable_first_token()->set_logprob(result.first_token.logprob);
  *out.mutable_manifest() = manifest;
  out.mutable_manifest()->mutable_layer_density()->Assign(result.layer_density.begin(),
                                                          result.layer_density.end());
  FillPrefix(result, out.mutable_manifest());
  v1::PrefillStatistics* statistics = out.mutable_statistics();
  FillTimes(result, now, statistics);
  statistics->set_executed_blocks(static_cast<uint64_t>(result.executed_blocks));
  statistics->set_causal_blocks(static_cast<uint64_t>(result.causal_blocks));
  statistics->set_dense_fallbacks(static_cast<uint32_t>(result.dense_fallbacks));
  return out;
}

v1::GetModelInfoResponse ToModelInfo(const ServedModel& model) {
  const Engine& engine = *model.engine;
  const ModelConfig& config = engine.config();
  v1::GetModelInfoResponse out;
  out.set_model(model.name);
  out.set_model_hash(engine.model_hash());
  out.set_architecture(config.architecture);
  out.set_vocab_size(config.vocab_size);
  out.set_max_prompt_tokens(static_cast<uint32_t>(engine.options().max_prompt_tokens));
  out.set_num_heads(config.heads.num_heads);
  out.set_hidden_size(config.hidden_size);
  *out.mutable_kv_layout() = ToLayout(engine, engine.geometry().dtype);
  out.set_kv_bytes_per_token(config.KvBytesPerToken(engine.geometry().dtype));
  return out;
}

v1::GetServerInfoResponse ToServerInfo(const ServedModel& model, bool draining) {
  const Engine& engine = *model.engine;
  const ServerOptions& options = *model.options;
  v1::GetServerInfoResponse out;
  out.set_version(kVersion);
  out.set_backend(engine.backend().name());
  out.set_device(engine.backend().device());
  *out.mutable_default_attention() = ToProto(model.default_attention);
  out.set_max_queue_requests(static_cast<uint32_t>(options.max_queue_requests));
  out.set_max_queue_tokens(options.max_queue_tokens);
  out.set_piece_tokens(static_cast<uint32_t>(engine.options().piece_tokens));
  out.set_batch_tokens(static_cast<uint32_t>(engine.options().batch_tokens));
  out.set_prefix_cache(options.prefix_cache);
  SetDuration(options.default_deadline, out.mutable_default_deadline());
  SetDuration(options.max_deadline, out.mutable_max_deadline());
  SetDuration(options.write_stall_timeout, out.mutable_write_stall_timeout());
  out.set_kv_pool_tokens(engine.options().kv_pool_tokens);
  out.set_draining(draining);
  out.set_host_kv_bytes(static_cast<uint64_t>(engine.options().host_kv_bytes));
  SetDuration(options.default_lease, out.mutable_default_lease());
  SetDuration(options.max_lease, out.mutable_max_lease());
  for (const DType dtype : engine.kv_dtypes()) out.add_kv_dtypes(ToKvDtype(dtype));
  return out;
}

void SetDuration(absl::Duration duration, google::protobuf::Duration* out) {
  const absl::Duration valid = std::clamp(duration, -kLongestDuration, kLongestDuration);
  out->set_seconds(absl::ToInt64Seconds(valid));
  out->set_nanos(static_cast<int32_t>(absl::ToInt64Nanoseconds(valid % absl::Seconds(1))));
}

grpc::ByteBuffer SerializeMessage(const google::protobuf::Message& message) {
  const grpc::Slice slice(message.SerializeAsString());
  return grpc::ByteBuffer(&slice, 1);
}

}  // namespace headstart
