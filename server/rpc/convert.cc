#include "server/rpc/convert.h"

#include <grpcpp/support/proto_buffer_reader.h>
#include <openssl/sha.h>

#include <bit>
#include <limits>
#include <optional>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"
#include "server/error.h"
#include "server/version.h"

namespace headstart {
namespace {

constexpr size_t kMaxRequestIdBytes = 128;
constexpr size_t kMaxTransferParamsBytes = 4096;
constexpr size_t kMaxQuotedBytes = 128;

// Text from a client, safe to print and cut to a sane length.
std::string Quoted(const std::string& text) {
  return absl::StrCat("\"", absl::CHexEscape(text.substr(0, kMaxQuotedBytes)), "\"");
}

absl::Status InvalidField(absl::string_view message) {
  return MakeError(absl::StatusCode::kInvalidArgument, ErrorReason::kInvalidField, message);
}

v1::KvDtype ToProto(DType dtype) {
  switch (dtype) {
    case DType::kBF16:
      return v1::KV_DTYPE_BF16;
    case DType::kF16:
      return v1::KV_DTYPE_F16;
    case DType::kF32:
      return v1::KV_DTYPE_F32;
    case DType::kI32:
      break;
  }
  return v1::KV_DTYPE_UNSPECIFIED;
}

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

absl::Status FromProto(v1::AttentionPreset preset, std::optional<AttentionPreset>* out) {
  switch (preset) {
    case v1::ATTENTION_PRESET_UNSPECIFIED:
      return absl::OkStatus();
    case v1::ATTENTION_PRESET_EXACT:
      *out = AttentionPreset::kExact;
      return absl::OkStatus();
    case v1::ATTENTION_PRESET_PAPER:
      *out = AttentionPreset::kPaper;
      return absl::OkStatus();
    case v1::ATTENTION_PRESET_BALANCED:
      *out = AttentionPreset::kBalanced;
      return absl::OkStatus();
    case v1::ATTENTION_PRESET_FAST:
      *out = AttentionPreset::kFast;
      return absl::OkStatus();
    default:
      return InvalidField(
          absl::StrCat("attention.preset=", static_cast<int>(preset), " is not a preset"));
  }
}

absl::Status FromProto(v1::BudgetRule rule, std::optional<BudgetRule>* out) {
  switch (rule) {
    case v1::BUDGET_RULE_UNSPECIFIED:
      return absl::OkStatus();
    case v1::BUDGET_RULE_OWN:
      *out = BudgetRule::kOwn;
      return absl::OkStatus();
    case v1::BUDGET_RULE_SHARED:
      *out = BudgetRule::kShared;
      return absl::OkStatus();
    case v1::BUDGET_RULE_ROW:
      *out = BudgetRule::kRow;
      return absl::OkStatus();
    default:
      return InvalidField(
          absl::StrCat("attention.budget=", static_cast<int>(rule), " is not a budget rule"));
  }
}

// Copies an optional uint32 of the request; what no int32 holds is nobody's valid value.
absl::Status FromProto(absl::string_view field, bool present, uint32_t value,
                       std::optional<int32_t>* out) {
  if (!present) return absl::OkStatus();
  if (value > std::numeric_limits<int32_t>::max()) {
    return InvalidField(absl::StrCat(field, "=", value, " is too large"));
  }
  *out = static_cast<int32_t>(value);
  return absl::OkStatus();
}

absl::StatusOr<AttentionRequest> FromProto(const v1::AttentionOptions& in) {
  AttentionRequest out;
  HEADSTART_RETURN_IF_ERROR(FromProto(in.preset(), &out.preset));
  HEADSTART_RETURN_IF_ERROR(FromProto(in.budget(), &out.budget));
  HEADSTART_RETURN_IF_ERROR(
      FromProto("attention.num_proxies", in.has_num_proxies(), in.num_proxies(), &out.num_proxies));
  HEADSTART_RETURN_IF_ERROR(
      FromProto("attention.stride", in.has_stride(), in.stride(), &out.stride));
  HEADSTART_RETURN_IF_ERROR(FromProto("attention.floor_tokens", in.has_floor_tokens(),
                                      in.floor_tokens(), &out.floor_tokens));
  HEADSTART_RETURN_IF_ERROR(
      FromProto("attention.sink_blocks", in.has_sink_blocks(), in.sink_blocks(), &out.sink_blocks));
  HEADSTART_RETURN_IF_ERROR(FromProto("attention.local_blocks", in.has_local_blocks(),
                                      in.local_blocks(), &out.local_blocks));
  HEADSTART_RETURN_IF_ERROR(FromProto("attention.dense_tail_blocks", in.has_dense_tail_blocks(),
                                      in.dense_tail_blocks(), &out.dense_tail_blocks));
  HEADSTART_RETURN_IF_ERROR(FromProto("attention.dense_below_tokens", in.has_dense_below_tokens(),
                                      in.dense_below_tokens(), &out.dense_below_tokens));
  if (in.has_gamma()) out.gamma = in.gamma();
  return out;
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

v1::AttentionProvenance ToProvenance(const PrefillJob& job) {
  v1::AttentionProvenance out;
  const bool below_limit =
      static_cast<int64_t>(job.token_ids.size()) <= job.attention.dense_below_tokens;
  const bool sparse = job.attention.enabled && !below_limit;
  out.set_algorithm(sparse ? v1::AttentionProvenance::ALGORITHM_PROXY_ATTN
                           : v1::AttentionProvenance::ALGORITHM_DENSE);
  if (job.attention.enabled && below_limit) out.set_dense_reason("below_dense_limit");
  *out.mutable_options() = ToProto(ResolvedAttention{job.preset, job.attention});
  return out;
}

v1::KvLayout ToLayout(const Engine& engine) {
  const ModelConfig& config = engine.config();
  v1::KvLayout out;
  out.set_num_layers(config.num_layers);
  out.set_num_kv_heads(config.heads.num_kv_heads);
  out.set_head_dim(config.heads.head_dim);
  out.set_dtype(ToProto(engine.kv_dtype()));
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

absl::Status CheckKvDtype(v1::KvDtype requested, DType served) {
  if (requested == v1::KV_DTYPE_UNSPECIFIED || requested == ToProto(served)) {
    return absl::OkStatus();
  }
  if (!v1::KvDtype_IsValid(requested)) {
    return InvalidField(absl::StrCat("kv_dtype=", static_cast<int>(requested), " is not a dtype"));
  }
  return MakeError(
      absl::StatusCode::kFailedPrecondition, ErrorReason::kKvDtypeUnavailable,
      absl::StrCat("kv_dtype=", v1::KvDtype_Name(requested),
                   " is not offered, this server's KV is ", v1::KvDtype_Name(ToProto(served))));
}

absl::Status FillTokens(const v1::PrefillRequest& request, int32_t vocab_size, PrefillJob* job) {
  job->token_ids.reserve(request.token_ids_size());
  for (int i = 0; i < request.token_ids_size(); ++i) {
    const uint32_t id = request.token_ids(i);
    if (id > std::numeric_limits<int32_t>::max()) {
      return InvalidField(
          absl::StrCat("token_ids[", i, "]=", id, " is not below vocab_size ", vocab_size));
    }
    job->token_ids.push_back(static_cast<int32_t>(id));
  }
  return absl::OkStatus();
}

absl::Status FillSampling(const v1::SamplingOptions& in, SamplingOptions* out) {
  std::optional<int32_t> top_k;
  HEADSTART_RETURN_IF_ERROR(FromProto("sampling.top_k", true, in.top_k(), &top_k));
  out->temperature = in.temperature();
  out->top_k = *top_k;
  out->top_p = in.top_p();
  out->seed = in.seed();
  return absl::OkStatus();
}

}  // namespace

absl::Status ParseMessage(const grpc::ByteBuffer& bytes, google::protobuf::Message* message) {
  grpc::ByteBuffer readable = bytes;  // another reference; the reader wants a mutable one
  grpc::ProtoBufferReader reader(&readable);
  if (reader.status().ok() && message->ParseFromZeroCopyStream(&reader)) return absl::OkStatus();
  return MakeError(absl::StatusCode::kInvalidArgument, ErrorReason::kMalformedRequest,
                   absl::StrCat("the request is no valid ", message->GetTypeName()));
}

grpc::ByteBuffer SerializeMessage(const google::protobuf::Message& message) {
  const grpc::Slice slice(message.SerializeAsString());
  return grpc::ByteBuffer(&slice, 1);
}

absl::Status CheckModelName(const std::string& requested, const std::string& served) {
  if (requested.empty() || requested == served) return absl::OkStatus();
  return MakeError(
      absl::StatusCode::kNotFound, ErrorReason::kUnknownModel,
      absl::StrCat("model ", Quoted(requested), " is not served here, ", Quoted(served), " is"));
}

absl::Status CheckRequestId(const std::string& id) {
  bool good = !id.empty() && id.size() <= kMaxRequestIdBytes;
  for (const char c : id) {
    good = good && (absl::ascii_isalnum(c) || c == '.' || c == '_' || c == ':' || c == '-');
  }
  if (good) return absl::OkStatus();
  return InvalidField(absl::StrCat("request_id ", Quoted(id), " is not 1 to ", kMaxRequestIdBytes,
                                   " characters of [A-Za-z0-9._:-]"));
}

absl::Status FillJob(const v1::PrefillRequest& request, const ServedModel& model, PrefillJob* job) {
  const Engine& engine = *model.engine;
  HEADSTART_RETURN_IF_ERROR(CheckKvDtype(request.kv_dtype(), engine.kv_dtype()));
  if (request.transfer_params().size() > kMaxTransferParamsBytes) {
    return InvalidField(absl::StrCat("transfer_params has ", request.transfer_params().size(),
                                     " bytes, limit ", kMaxTransferParamsBytes));
  }
  HEADSTART_RETURN_IF_ERROR(FillTokens(request, engine.config().vocab_size, job));
  HEADSTART_RETURN_IF_ERROR(FillSampling(request.sampling(), &job->sampling));
  HEADSTART_ASSIGN_OR_RETURN(const AttentionRequest wanted, FromProto(request.attention()));
  HEADSTART_ASSIGN_OR_RETURN(
      ResolvedAttention attention,
      ResolveAttention(wanted, model.options->attention, engine.config().heads));
  job->preset = attention.preset;
  job->attention = std::move(attention.options);
  return engine.Validate(*job);
}

v1::KvManifest ToManifest(const PrefillJob& job, const ServedModel& model) {
  v1::KvManifest out;
  out.set_model(model.name);
  out.set_model_hash(model.engine->model_hash());
  out.set_token_hash(TokenHash(job.token_ids));
  out.set_num_tokens(static_cast<uint32_t>(job.token_ids.size()));
  *out.mutable_layout() = ToLayout(*model.engine);
  *out.mutable_attention() = ToProvenance(job);
  return out;
}

v1::Completed ToCompleted(const v1::KvManifest& manifest, const PrefillResult& result) {
  v1::Completed out;
  out.mutable_first_token()->set_id(result.first_token.id);
  out.mutable_first_token()->set_logprob(result.first_token.logprob);
  *out.mutable_manifest() = manifest;
  out.mutable_manifest()->mutable_layer_density()->Assign(result.layer_density.begin(),
                                                          result.layer_density.end());
  v1::PrefillStatistics* statistics = out.mutable_statistics();
  statistics->set_executed_blocks(result.executed_blocks);
  statistics->set_causal_blocks(result.causal_blocks);
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
  *out.mutable_kv_layout() = ToLayout(engine);
  out.set_kv_bytes_per_token(config.KvBytesPerToken(engine.kv_dtype()));
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
  out.set_max_queue_requests(static_cast<uint32_t>(options.admission.max_requests));
  out.set_max_queue_tokens(options.admission.max_tokens);
  out.set_prefill_chunk_tokens(static_cast<uint32_t>(engine.options().chunk_tokens));
  SetDuration(options.default_deadline, out.mutable_default_deadline());
  SetDuration(options.max_deadline, out.mutable_max_deadline());
  SetDuration(options.write_stall_timeout, out.mutable_write_stall_timeout());
  out.set_kv_pool_tokens(engine.options().kv_pool_tokens);
  out.set_draining(draining);
  return out;
}

void SetDuration(absl::Duration duration, google::protobuf::Duration* out) {
  out->set_seconds(absl::ToInt64Seconds(duration));
  out->set_nanos(static_cast<int32_t>(absl::ToInt64Nanoseconds(duration % absl::Seconds(1))));
}

}  // namespace headstart
