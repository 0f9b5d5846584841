#include "client/prefill_client.h"

#include <algorithm>
#include <thread>
#include <utility>
#include <vector>

#include "absl/memory/memory.h"
#include "absl/random/random.h"
#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "client/checksum.h"
#include "client/connections.h"
#include "client/fetch_address.h"
#include "client/part_fetch.h"
#include "client/prefill_attempt.h"
#include "client/retry.h"
#include "client/unary_call.h"
#include "kernels/base/instant.h"
#include "kernels/base/status_macros.h"

namespace headstart {
namespace {

// What the request makes certain about the answer.
void ExpectAnswerTo(const v1::PrefillRequest& request, KvExpectation* expected) {
  const auto& ids = request.token_ids();
  expected->token_hash = TokenHash(absl::MakeConstSpan(ids.data(), ids.size()));
  expected->num_tokens = ids.size();
  expected->skip_tokens = request.skip_tokens();
  expected->held_pages = request.held_pages();
  expected->cache_salt = request.cache_salt();
  expected->prefix_reuse = request.prefix_reuse();
  expected->token_ids.assign(ids.begin(), ids.end());
  if (!request.request_id().empty()) expected->request_id = request.request_id();
  if (!request.model().empty()) expected->model = request.model();
  if (request.kv_dtype() != v1::KV_DTYPE_UNSPECIFIED) expected->dtype = request.kv_dtype();
  if (request.attention().preset() == v1::ATTENTION_PRESET_EXACT) expected->dense = true;
}

absl::Status CheckOptions(const PrefillClientOptions& options) {
  if (options.timeout <= absl::ZeroDuration() || options.timeout == absl::InfiniteDuration()) {
    return absl::InvalidArgumentError("timeout must be positive and finite");
  }
  for (const auto& [name, value] :
       {std::pair("connections", options.connections),
        std::pair("max_automatic_connections", options.max_automatic_connections)}) {
    if (value < 0 || value > kMaxConnections) {
      return absl::InvalidArgumentError(
          absl::StrCat(name, "=", value, " is not in [0, ", kMaxConnections, "]"));
    }
  }
  return absl::OkStatus();
}

// More than any model has; bounds what a server may say.
constexpr uint64_t kMostBytesPerToken = 1 << 30;

UnaryOptions WithinTimeout(const PrefillClientOptions& options) {
  return {.deadline = Instant::Now() + options.timeout, .wait_for_ready = options.wait_for_ready};
}

Instant DeadlineOf(const PrefillClientOptions& options, const KvReceiverOptions& receive) {
  return Instant::Now() +
         (receive.timeout > absl::ZeroDuration() ? receive.timeout : options.timeout);
}

// So that a second attempt does not meet the first as a stranger.
std::string NewAttemptKey() {
  std::string key(16, '\0');
  absl::BitGen random;
  for (char& byte : key) byte = static_cast<char>(absl::Uniform<uint8_t>(random));
  return key;
}

int MaxAutomaticConnections(const PrefillClientOptions& options) {
  if (options.max_automatic_connections > 0) return options.max_automatic_connections;
  return std::clamp(static_cast<int>(std::thread::hardware_concurrency()) / 2, 1, 8);
}

}  // namespace

std::vector<v1::KvPart> StripesOf(const v1::KvPart& part, int count) {
  std::vector<v1::KvPart> stripes(count, part);
  for (int i = 0; i < count; ++i) {
    stripes[i].set_stripe_index(i);
    stripes[i].set_stripe_count(count);
  }
  return stripes;
}

int AutomaticConnections(int64_t kv_bytes, int max_connections) {
  constexpr int64_t kBytesPerConnection = 32 << 20;
  return static_cast<int>(
      std::clamp<int64_t>((kv_bytes - 1) / kBytesPerConnection + 1, 1, max_connections));
}

PrefillClient::PrefillClient(PrefillClientOptions options, std::unique_ptr<Connections> connections)
    : options_(std::move(options)), connections_(std::move(connections)) {}

PrefillClient::~PrefillClient() = default;

absl::StatusOr<std::unique_ptr<PrefillClient>> PrefillClient::Create(
    const PrefillClientOptions& options) {
  HEADSTART_RETURN_IF_ERROR(CheckOptions(options));
  HEADSTART_ASSIGN_OR_RETURN(auto connections, Connections::Create(options));
  return absl::WrapUnique(new PrefillClient(options, std::move(connections)));
}

absl::StatusOr<PrefillOutcome> PrefillClient::Prefill(v1::PrefillRequest request,
                                                      KvReceiverOptions receive,
                                                      CancelToken* cancel) const {
  ExpectAnswerTo(request, &receive.expected);
  if (request.attempt_key().empty()) request.set_attempt_key(NewAttemptKey());
  CancelToken never;
  CancelToken& token = cancel != nullptr ? *cancel : never;
  const Instant deadline = DeadlineOf(options_, receive);
  for (int attempts = 1;; ++attempts) {
    const absl::StatusOr<int> connections = ConnectionsFor(request, deadline, token);
    PrefillAttempt attempt(options_, *connections_, request, receive, connections.value_or(1),
                           deadline, token);
    const absl::Status status = connections.ok() ? attempt.Run() : connections.status();
    if (status.ok()) {
      PrefillOutcome outcome = attempt.Outcome();
      outcome.attempts = attempts;
      return outcome;
    }
    if (attempt.num_chunks() > 0 || !MayRetry(status, options_.retry)) return status;
    HEADSTART_RETURN_IF_ERROR(PauseBeforeRetry(status, attempts, options_.retry, deadline, token));
  }
}

absl::StatusOr<int> PrefillClient::ConnectionsFor(const v1::PrefillRequest& request,
                                                  Instant deadline, CancelToken& cancel) const {
  if (request.has_detached()) return 1;
  if (options_.connections > 0) return options_.connections;
  const int most = MaxAutomaticConnections(options_);
  if (most == 1) return 1;
  HEADSTART_ASSIGN_OR_RETURN(const int64_t token_bytes,
                             KvBytesPerToken(request.model(), deadline, cancel));
  const int64_t tokens = request.token_ids_size() - int64_t{request.skip_tokens()};
  // Of bf16, fp8 has half.
  const int64_t shrinks = request.kv_dtype() == v1::KV_DTYPE_FP8_E4M3 ? 2 : 1;
  return AutomaticConnections(tokens * token_bytes / shrinks, most);
}

absl::StatusOr<int64_t> PrefillClient::KvBytesPerToken(const std::string& model, Instant deadline,
                                                       CancelToken& cancel) const {
  {
    absl::MutexLock lock(&mutex_);
    const auto known = kv_bytes_per_token_.find(model);
    if (known != kv_bytes_per_token_.end()) return known->second;
  }
  v1::GetModelInfoRequest request;
  request.set_model(model);
  HEADSTART_ASSIGN_OR_RETURN(
      const v1::GetModelInfoResponse info,
      UnaryCall(
          connections_->main(), &v1::PrefillService::Stub::GetModelInfo, request,
          {.deadline = deadline, .wait_for_ready = options_.wait_for_ready, .cancel = &cancel}));
  absl::MutexLock lock(&mutex_);
  return kv_bytes_per_token_[model] =
             static_cast<int64_t>(std::min(info.kv_bytes_per_token(), kMostBytesPerToken));
}

absl::StatusOr<FetchOutcome> PrefillClient::Fetch(const KvLocation& location,
                                                  const v1::KvPart& part, int num_stripes,
                                                  KvReceiverOptions receive,
                                                  CancelToken* cancel) const {
  if (num_stripes < 1 || num_stripes > kMaxConnections || part.stripe_count() > 1) {
    return absl::InvalidArgumentError(absl::StrCat("num_stripes=", num_stripes, " is not in [1, ",
                                                   kMaxConnections,
                                                   "], or the part is a stripe itself"));
  }
  if (!receive.expected.held_pages.empty() && receive.expected.token_ids.empty()) {
    return absl::InvalidArgumentError("held_pages can only be checked with the prompt's token_ids");
  }
  HEADSTART_ASSIGN_OR_RETURN(const std::string target,
                             FetchTarget(options_, location.fetch_address, /*peer=*/""));
  const Instant deadline = DeadlineOf(options_, receive);
  CancelToken token(cancel);
  KvAssembly assembly(std::move(receive), part);
  PartFetch fetch;
  fetch.Start({.fetch_id = location.fetch_id,
               .target = target,
               .deadline = deadline,
               .retry = options_.retry,
               .cancel = &token,
               .assembly = &assembly},
              StripesOf(part, num_stripes), *connections_);
  HEADSTART_RETURN_IF_ERROR(fetch.Join());
  HEADSTART_RETURN_IF_ERROR(assembly.CheckWhole());
  return FetchOutcome{.completed = assembly.completed(), .resumes = fetch.resumes()};
}

absl::StatusOr<std::shared_ptr<grpc::Channel>> PrefillClient::ChannelTo(
    const KvLocation& location) const {
  HEADSTART_ASSIGN_OR_RETURN(const std::string target,
                             FetchTarget(options_, location.fetch_address, /*peer=*/""));
  return connections_->ForFetch(target, 0);
}

absl::StatusOr<absl::Duration> PrefillClient::RenewLease(const KvLocation& location) const {
  v1::RenewLeaseRequest request;
  request.set_fetch_id(location.fetch_id);
  HEADSTART_ASSIGN_OR_RETURN(const auto channel, ChannelTo(location));
  HEADSTART_ASSIGN_OR_RETURN(
      const v1::RenewLeaseResponse response,
      UnaryCall(channel, &v1::PrefillService::Stub::RenewLease, request, WithinTimeout(options_)));
  return absl::Seconds(response.lease().seconds()) + absl::Nanoseconds(response.lease().nanos());
}

absl::Status PrefillClient::ReleaseKv(const KvLocation& location) const {
  v1::ReleaseKvRequest request;
  request.set_fetch_id(location.fetch_id);
  HEADSTART_ASSIGN_OR_RETURN(const auto channel, ChannelTo(location));
  return UnaryCall(channel, &v1::PrefillService::Stub::ReleaseKv, request, WithinTimeout(options_))
      .status();
}

absl::StatusOr<v1::GetModelInfoResponse> PrefillClient::GetModelInfo(
    const std::string& model) const {
  v1::GetModelInfoRequest request;
  request.set_model(model);
  return UnaryCall(connections_->main(), &v1::PrefillService::Stub::GetModelInfo, request,
                   WithinTimeout(options_));
}

absl::StatusOr<v1::EstimateResponse> PrefillClient::Estimate(
    const v1::EstimateRequest& request) const {
  v1::EstimateRequest bounded = request;
  if (!request.has_deadline()) {
    const int64_t nanoseconds = absl::ToInt64Nanoseconds(options_.timeout);
    bounded.mutable_deadline()->set_seconds(nanoseconds / 1'000'000'000);
    bounded.mutable_deadline()->set_nanos(static_cast<int32_t>(nanoseconds % 1'000'000'000));
  }
  return UnaryCall(connections_->main(), &v1::PrefillService::Stub::Estimate, bounded,
                   WithinTimeout(options_));
}

absl::StatusOr<v1::GetLoadsResponse> PrefillClient::GetLoads() const {
  return UnaryCall(connections_->main(), &v1::PrefillService::Stub::GetLoads, v1::GetLoadsRequest(),
                   WithinTimeout(options_));
}

absl::StatusOr<v1::GetServerInfoResponse> PrefillClient::GetServerInfo() const {
  return UnaryCall(connections_->main(), &v1::PrefillService::Stub::GetServerInfo,
                   v1::GetServerInfoRequest(), WithinTimeout(options_));
}

}  // namespace headstart
