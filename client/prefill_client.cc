#include "client/prefill_client.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "absl/random/random.h"
#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "client/channel.h"
#include "client/checksum.h"
#include "client/grpc_status.h"
#include "client/response_stream.h"
#include "headstart/v1/prefill.grpc.pb.h"

namespace headstart {
namespace {

// What the request makes certain about the answer.
void ExpectAnswerTo(const v1::PrefillRequest& request, KvExpectation* expected) {
  const auto& ids = request.token_ids();
  expected->token_hash = TokenHash(absl::MakeConstSpan(ids.data(), ids.size()));
  expected->num_tokens = ids.size();
  if (!request.request_id().empty()) expected->request_id = request.request_id();
  if (!request.model().empty()) expected->model = request.model();
  if (request.kv_dtype() != v1::KV_DTYPE_UNSPECIFIED) expected->dtype = request.kv_dtype();
  if (request.attention().preset() == v1::ATTENTION_PRESET_EXACT) expected->dense = true;
}

// A stream that had begun to deliver and was then ended by anything but the server's own word, the
// caller or the clock is broken: what came is incomplete and nobody vouches for it.
absl::Status StatusAfterChunks(absl::Status status, int64_t num_chunks) {
  const bool vouched = ErrorInfoOf(status).has_value() || absl::IsCancelled(status) ||
                       absl::IsDeadlineExceeded(status);
  if (vouched || num_chunks == 0) return status;
  return absl::DataLossError(
      absl::StrCat("the stream broke after ", num_chunks, " chunks: ", status.ToString()));
}

bool MayRetry(const absl::Status& status, const RetryOptions& retry) {
  if (absl::IsUnavailable(status)) return true;
  return retry.when_queue_full && absl::IsResourceExhausted(status) &&
         ErrorReasonOf(status) == "QUEUE_FULL";
}

absl::Duration RetryPause(const absl::Status& status, const RetryOptions& retry,
                          int failed_attempts) {
  if (const auto told = RetryDelayOf(status)) return *told;
  absl::Duration pause = retry.initial_backoff;
  for (int i = 1; i < failed_attempts && pause < retry.max_backoff; ++i) pause *= 2;
  absl::BitGen random;
  return std::min(pause, retry.max_backoff) * absl::Uniform(random, 0.8, 1.2);
}

// Notes when the receiver entered a new stage.
void UpdateTiming(const KvReceiver& receiver, int64_t chunks_before, absl::Duration now,
                  PrefillTiming* timing) {
  if (receiver.num_chunks() > chunks_before) {
    if (chunks_before == 0) timing->first_chunk = now;
    timing->last_chunk = now;
  } else if (receiver.completed().has_first_token()) {
    timing->completed = now;
  } else if (receiver.shape().num_tokens > 0) {
    timing->manifest = now;
  } else {
    timing->accepted = now;
  }
}

}  // namespace

void CancelToken::Cancel() {
  absl::MutexLock lock(&mutex_);
  cancelled_ = true;
  if (context_ != nullptr) context_->TryCancel();
}

bool CancelToken::cancelled() const {
  absl::MutexLock lock(&mutex_);
  return cancelled_;
}

void CancelToken::Attach(grpc::ClientContext* context) {
  absl::MutexLock lock(&mutex_);
  context_ = context;
  if (cancelled_ && context_ != nullptr) context_->TryCancel();
}

bool CancelToken::SleepUntil(absl::Time time) const {
  absl::MutexLock lock(&mutex_);
  return !mutex_.AwaitWithDeadline(absl::Condition(&cancelled_), time);
}

struct PrefillClient::Attempt {
  explicit Attempt(KvReceiverOptions options) : receiver(std::move(options)) {}

  KvReceiver receiver;
  PrefillTiming timing;
};

PrefillClient::PrefillClient(PrefillClientOptions options, std::shared_ptr<grpc::Channel> channel)
    : options_(std::move(options)), channel_(std::move(channel)) {}

absl::StatusOr<std::unique_ptr<PrefillClient>> PrefillClient::Create(
    const PrefillClientOptions& options) {
  if (options.timeout <= absl::ZeroDuration() || options.timeout == absl::InfiniteDuration()) {
    return absl::InvalidArgumentError("timeout must be positive and finite");
  }
  auto channel = MakeChannel(options);
  if (!channel.ok()) return channel.status();
  return absl::WrapUnique(new PrefillClient(options, *std::move(channel)));
}

absl::StatusOr<PrefillOutcome> PrefillClient::Prefill(const v1::PrefillRequest& request,
                                                      KvReceiverOptions receive,
                                                      CancelToken* cancel) const {
  ExpectAnswerTo(request, &receive.expected);
  CancelToken never;
  CancelToken& token = cancel != nullptr ? *cancel : never;
  const absl::Time deadline = absl::Now() + options_.timeout;
  for (int attempts = 1;; ++attempts) {
    Attempt attempt(receive);
    const absl::Status status = RunAttempt(request, deadline, token, attempt);
    if (status.ok()) {
      return PrefillOutcome{attempt.receiver.accepted(), attempt.receiver.completed(),
                            attempt.timing, attempts};
    }
    const bool retriable = attempt.receiver.num_chunks() == 0 && MayRetry(status, options_.retry);
    if (!retriable || attempts >= options_.retry.max_attempts) return status;
    const absl::Duration pause = RetryPause(status, options_.retry, attempts);
    const absl::Time next = absl::Now() + pause;
    if (next >= deadline) return status;
    if (options_.retry.on_retry) options_.retry.on_retry(status, pause);
    if (!token.SleepUntil(next)) return absl::CancelledError("cancelled between two attempts");
  }
}

absl::Status PrefillClient::RunAttempt(const v1::PrefillRequest& request, absl::Time deadline,
                                       CancelToken& cancel, Attempt& attempt) const {
  grpc::ClientContext context;
  context.set_deadline(absl::ToChronoTime(deadline));
  context.set_wait_for_ready(options_.wait_for_ready);
  const absl::Time start = absl::Now();
  cancel.Attach(&context);  // before the stream: opening it may take a connection
  ResponseStream stream(channel_, request, &context);
  absl::Status status;
  grpc::ByteBuffer message;
  while (status.ok() && stream.Read(&message)) {
    const int64_t chunks_before = attempt.receiver.num_chunks();
    status = attempt.receiver.OnMessage(message);
    UpdateTiming(attempt.receiver, chunks_before, absl::Now() - start, &attempt.timing);
  }
  if (!status.ok()) context.TryCancel();
  const absl::Status end = ToAbslStatus(stream.Finish());
  cancel.Attach(nullptr);
  if (!status.ok()) return status;
  if (!end.ok()) return StatusAfterChunks(end, attempt.receiver.num_chunks());
  return attempt.receiver.OnEnd();
}

absl::StatusOr<v1::GetModelInfoResponse> PrefillClient::GetModelInfo(
    const std::string& model) const {
  grpc::ClientContext context;
  context.set_deadline(absl::ToChronoTime(absl::Now() + options_.timeout));
  context.set_wait_for_ready(options_.wait_for_ready);
  v1::GetModelInfoRequest request;
  request.set_model(model);
  v1::GetModelInfoResponse response;
  const grpc::Status status =
      v1::PrefillService::NewStub(channel_)->GetModelInfo(&context, request, &response);
  if (!status.ok()) return ToAbslStatus(status);
  return response;
}

absl::StatusOr<v1::GetServerInfoResponse> PrefillClient::GetServerInfo() const {
  grpc::ClientContext context;
  context.set_deadline(absl::ToChronoTime(absl::Now() + options_.timeout));
  context.set_wait_for_ready(options_.wait_for_ready);
  v1::GetServerInfoResponse response;
  const grpc::Status status =
      v1::PrefillService::NewStub(channel_)->GetServerInfo(&context, {}, &response);
  if (!status.ok()) return ToAbslStatus(status);
  return response;
}

}  // namespace headstart
