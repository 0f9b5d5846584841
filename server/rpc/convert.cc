#include "server/rpc/convert.h"

#include <grpcpp/support/proto_buffer_reader.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <utility>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "engine/error.h"
#include "kernels/base/instant.h"
#include "kernels/base/status_macros.h"
#include "server/rpc/describe.h"

namespace headstart {
namespace {

constexpr size_t kMaxRequestIdBytes = 128;
constexpr size_t kMaxTransferParamsBytes = 4096;
constexpr size_t kMaxAttemptKeyBytes = 64;
constexpr size_t kMaxSaltBytes = 64;
constexpr size_t kMaxQuotedBytes = 128;

// Text from a client, safe to print and cut to a sane length.
std::string Quoted(const std::string& text) {
  return absl::StrCat("\"", absl::CHexEscape(text.substr(0, kMaxQuotedBytes)), "\"");
}

absl::Status InvalidField(absl::string_view message) {
  return MakeError(absl::StatusCode::kInvalidArgument, ErrorReason::kInvalidField, message);
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

// None: as it is computed. Whether the engine offers it is for Engine::Validate.
absl::StatusOr<std::optional<DType>> FromProto(v1::KvDtype dtype) {
  switch (dtype) {
    case v1::KV_DTYPE_UNSPECIFIED:
      return std::nullopt;
    case v1::KV_DTYPE_BF16:
      return DType::kBF16;
    case v1::KV_DTYPE_F16:
      return DType::kF16;
    case v1::KV_DTYPE_F32:
      return DType::kF32;
    case v1::KV_DTYPE_FP8_E4M3:
      return DType::kF8E4M3;
    default:
      return InvalidField(absl::StrCat("kv_dtype=", static_cast<int>(dtype), " is not a dtype"));
  }
}

// Which pages the prompt may be found in. Those of dense prompts stand for any prompt's start, if
// the client wants that; else those that were made as this prompt's own will be.
absl::Status FillPrefix(const v1::PrefillRequest& in, const ServedModel& model,
                        PrefillRequest* out) {
  if (!v1::PrefixReuse_IsValid(in.prefix_reuse())) {
    return InvalidField(absl::StrCat("prefix_reuse=", static_cast<int>(in.prefix_reuse()),
                                     " is not a way to reuse prefixes"));
  }
  if (in.cache_salt().size() > kMaxSaltBytes) {
    return InvalidField(
        absl::StrCat("cache_salt has ", in.cache_salt().size(), " bytes, limit ", kMaxSaltBytes));
  }
  out->prefix.held_pages = in.held_pages();
  if (!model.options->prefix_cache || in.prefix_reuse() == v1::PREFIX_REUSE_NONE) {
    return absl::OkStatus();
  }
  const bool runs_dense = !out->attention.enabled || IsBelowDenseLimit(*out);
  const bool finds_dense = runs_dense || in.prefix_reuse() == v1::PREFIX_REUSE_DENSE;
  out->prefix.cache_root =
      ToCacheRoot(in.cache_salt(), finds_dense ? nullptr : out, model).SerializeAsString();
  out->prefix.keeps_pages = finds_dense == runs_dense;
  out->prefix.any_page = finds_dense;
  return absl::OkStatus();
}

absl::Status FillTokens(const v1::PrefillRequest& request, int32_t vocab_size,
                        std::vector<int32_t>* out) {
  out->reserve(static_cast<size_t>(request.token_ids_size()));
  for (int i = 0; i < request.token_ids_size(); ++i) {
    const uint32_t id = request.token_ids(i);
    if (id > std::numeric_limits<int32_t>::max()) {
      return InvalidField(
          absl::StrCat("token_ids[", i, "]=", id, " is not below vocab_size ", vocab_size));
    }
    out->push_back(static_cast<int32_t>(id));
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

absl::StatusOr<absl::Duration> FromProto(absl::string_view field,
                                         const google::protobuf::Duration& in) {
  const absl::Duration out = absl::Seconds(in.seconds()) + absl::Nanoseconds(in.nanos());
  if (out > absl::ZeroDuration()) return out;
  return InvalidField(absl::StrCat(field, "=", absl::FormatDuration(out), " is no time"));
}

absl::StatusOr<DetachedKv> FromProto(const v1::DetachedKv& in, const KvGeometry& geometry) {
  DetachedKv out;
  if (in.has_lease()) {
    HEADSTART_ASSIGN_OR_RETURN(out.lease, FromProto("detached.lease", in.lease()));
  }
  for (int i = 0; i < in.readers_size(); ++i) {
    HEADSTART_ASSIGN_OR_RETURN(const KvPart part, ToPart(absl::StrCat("detached.readers[", i, "]."),
                                                         in.readers(i), geometry));
    out.readers.push_back(part);
  }
  return out;
}

}  // namespace

absl::Status ParseMessage(const grpc::ByteBuffer& bytes, google::protobuf::Message* message) {
  grpc::ByteBuffer readable = bytes;  // another reference; the reader wants a mutable one
  grpc::ProtoBufferReader reader(&readable);
  if (reader.status().ok() && message->ParseFromZeroCopyStream(&reader)) return absl::OkStatus();
  return MakeError(absl::StatusCode::kInvalidArgument, ErrorReason::kMalformedRequest,
                   absl::StrCat("the request is no valid ", message->GetTypeName()));
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

absl::StatusOr<PrefillRequest> ToRequest(const v1::PrefillRequest& request,
                                         const ServedModel& model) {
  const Engine& engine = *model.engine;
  PrefillRequest out;
  HEADSTART_ASSIGN_OR_RETURN(out.kv_dtype, FromProto(request.kv_dtype()));
  if (request.transfer_params().size() > kMaxTransferParamsBytes) {
    return InvalidField(absl::StrCat("transfer_params has ", request.transfer_params().size(),
                                     " bytes, limit ", kMaxTransferParamsBytes));
  }
  if (request.attempt_key().size() > kMaxAttemptKeyBytes) {
    return InvalidField(absl::StrCat("attempt_key has ", request.attempt_key().size(),
                                     " bytes, limit ", kMaxAttemptKeyBytes));
  }
  out.attempt_key = request.attempt_key();
  HEADSTART_RETURN_IF_ERROR(FillTokens(request, engine.config().vocab_size, &out.token_ids));
  HEADSTART_RETURN_IF_ERROR(FillSampling(request.sampling(), &out.sampling));
  HEADSTART_ASSIGN_OR_RETURN(const AttentionRequest wanted, FromProto(request.attention()));
  HEADSTART_ASSIGN_OR_RETURN(
      ResolvedAttention attention,
      ResolveAttention(wanted, model.options->attention, engine.config().heads));
  out.preset = attention.preset;
  out.attention = std::move(attention.options);
  out.priority = request.priority();
  out.skip_tokens = request.skip_tokens();
  HEADSTART_RETURN_IF_ERROR(FillPrefix(request, model, &out));
  if (request.has_detached()) {
    HEADSTART_ASSIGN_OR_RETURN(out.detached, FromProto(request.detached(), engine.geometry()));
  }
  HEADSTART_RETURN_IF_ERROR(engine.Validate(out));
  engine.NamePages(out);
  out.manifest = ToManifest(out, model).SerializeAsString();
  return out;
}

absl::StatusOr<PrefillRequest> ToRequest(const v1::EstimateRequest& request,
                                         const ServedModel& model) {
  const v1::PrefillRequest& prefill = request.request();
  if (prefill.token_ids_size() > 0 || request.num_tokens() == 0) return ToRequest(prefill, model);
  const int64_t limit = model.engine->config().max_positions;
  if (request.num_tokens() > limit) {
    return InvalidField(absl::StrCat("num_tokens=", request.num_tokens(), ", limit ", limit));
  }
  v1::PrefillRequest any = prefill;
  any.mutable_token_ids()->Resize(static_cast<int>(request.num_tokens()), 0);
  any.set_prefix_reuse(v1::PREFIX_REUSE_NONE);
  return ToRequest(any, model);
}

absl::StatusOr<Instant> DeadlineOf(const v1::EstimateRequest& request,
                                   const ServerOptions& options) {
  absl::Duration left = options.default_deadline;
  if (request.has_deadline()) {
    HEADSTART_ASSIGN_OR_RETURN(left, FromProto("deadline", request.deadline()));
  }
  return Instant::Now() + std::min(left, options.max_deadline);
}

absl::StatusOr<KvPart> ToPart(absl::string_view path, const v1::KvPart& part,
                              const KvGeometry& geometry) {
  for (const auto& [field, value] : {std::pair("layer_begin", part.layer_begin()),
                                     {"layer_count", part.layer_count()},
                                     {"kv_head_begin", part.kv_head_begin()},
                                     {"kv_head_count", part.kv_head_count()},
                                     {"stripe_index", part.stripe_index()},
                                     {"stripe_count", part.stripe_count()}}) {
    if (value > std::numeric_limits<int32_t>::max()) {
      return InvalidField(absl::StrCat(path, field, "=", value, " is too large"));
    }
  }
  KvPart out;
  out.layer_begin = static_cast<int32_t>(part.layer_begin());
  out.layer_count = part.layer_count() == 0 ? geometry.num_layers - out.layer_begin
                                            : static_cast<int32_t>(part.layer_count());
  out.head_begin = static_cast<int32_t>(part.kv_head_begin());
  out.head_count = part.kv_head_count() == 0 ? geometry.heads.num_kv_heads - out.head_begin
                                             : static_cast<int32_t>(part.kv_head_count());
  out.stripe_index = static_cast<int32_t>(part.stripe_index());
  out.stripe_count = std::max(static_cast<int32_t>(part.stripe_count()), 1);
  const absl::Status inside = CheckPart(out, geometry);
  if (!inside.ok()) return InvalidField(absl::StrCat(path, inside.message()));
  return out;
}

bool IsBelowDenseLimit(const PrefillRequest& request) {
  return request.attention.enabled && request.num_tokens() <= request.attention.dense_below_tokens;
}

}  // namespace headstart
