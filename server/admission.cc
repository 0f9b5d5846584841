#include "server/admission.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "kernels/base/check.h"
#include "kernels/base/status_macros.h"
#include "server/error.h"

namespace headstart {
namespace {

constexpr absl::Duration kMinRetryDelay = absl::Milliseconds(100);
constexpr absl::Duration kMaxRetryDelay = absl::Seconds(30);
constexpr absl::Duration kUnknownRetryDelay = absl::Seconds(1);

}  // namespace

void TokenRate::Add(int64_t tokens, absl::Duration compute) {
  if (compute <= absl::ZeroDuration()) return;
  recent_[num_runs_ % recent_.size()] =
      static_cast<double>(tokens) / absl::ToDoubleSeconds(compute);
  ++num_runs_;
}

std::optional<double> TokenRate::Best() const {
  if (num_runs_ < kMinRuns) return std::nullopt;
  return *std::max_element(recent_.begin(), recent_.end());
}

Ticket& Ticket::operator=(Ticket&& other) noexcept {
  std::swap(admission_, other.admission_);
  std::swap(request_id_, other.request_id_);
  std::swap(num_tokens_, other.num_tokens_);
  std::swap(queued_, other.queued_);
  std::swap(requests_ahead_, other.requests_ahead_);
  std::swap(tokens_ahead_, other.tokens_ahead_);
  return *this;
}

Ticket::~Ticket() {
  if (admission_ != nullptr) admission_->Release(*this);
}

void Ticket::Start() {
  HEADSTART_CHECK(admission_ != nullptr && queued_);
  queued_ = false;
  admission_->Start(num_tokens_);
}

Admission::Admission(const AdmissionLimits& limits, absl::Status closed)
    : limits_(limits), closed_(std::move(closed)) {}

void Admission::Open() {
  MutexLock lock(&mutex_);
  closed_ = absl::OkStatus();
}

void Admission::Close(absl::Status why) {
  MutexLock lock(&mutex_);
  closed_ = std::move(why);
}

absl::Status Admission::CheckOpen() const {
  MutexLock lock(&mutex_);
  return closed_;
}

absl::StatusOr<Ticket> Admission::Admit(const std::string& request_id, int64_t num_tokens,
                                        absl::Time deadline) {
  MutexLock lock(&mutex_);
  HEADSTART_RETURN_IF_ERROR(closed_);
  if (request_ids_.contains(request_id)) {
    return MakeError(absl::StatusCode::kAlreadyExists, ErrorReason::kDuplicateRequestId,
                     absl::StrCat("request_id: ", request_id, " is in flight"));
  }
  HEADSTART_RETURN_IF_ERROR(CheckRoom(num_tokens));
  HEADSTART_RETURN_IF_ERROR(CheckDeadline(num_tokens, deadline));

  Ticket ticket;
  ticket.admission_ = this;
  ticket.request_id_ = request_id;
  ticket.num_tokens_ = num_tokens;
  ticket.requests_ahead_ = load_.inflight_requests;
  ticket.tokens_ahead_ = load_.inflight_tokens;
  request_ids_.insert(request_id);
  ++load_.queued_requests;
  load_.queued_tokens += num_tokens;
  ++load_.inflight_requests;
  load_.inflight_tokens += num_tokens;
  ++load_.acquired;
  return ticket;
}

absl::Status Admission::CheckRoom(int64_t num_tokens) const {
  if (load_.inflight_requests == 0) return absl::OkStatus();
  if (load_.inflight_requests < limits_.max_requests &&
      load_.inflight_tokens + num_tokens <= limits_.max_tokens) {
    return absl::OkStatus();
  }
  return MakeRetryableError(absl::StatusCode::kResourceExhausted, ErrorReason::kQueueFull,
                            absl::StrCat("queue full: ", load_.inflight_requests, " requests of ",
                                         limits_.max_requests, ", ", load_.inflight_tokens, " + ",
                                         num_tokens, " tokens of ", limits_.max_tokens),
                            RetryDelay(num_tokens));
}

absl::Status Admission::CheckDeadline(int64_t num_tokens, absl::Time deadline) const {
  const absl::Duration left = deadline - absl::Now();
  if (left <= absl::ZeroDuration()) {
    return MakeError(absl::StatusCode::kDeadlineExceeded, ErrorReason::kDeadlineExceeded,
                     "the deadline had passed when the request came");
  }
  const std::optional<double> rate = rate_.Best();
  if (!rate) return absl::OkStatus();
  // The running prompt may be nearly done, so it does not count. Half the prediction is the benefit
  // of the doubt: prompts of other lengths run at other rates.
  const double tokens = static_cast<double>(load_.queued_tokens + num_tokens);
  const absl::Duration predicted = absl::Seconds(tokens / *rate);
  if (predicted / 2 <= left) return absl::OkStatus();
  return MakeError(
      absl::StatusCode::kDeadlineExceeded, ErrorReason::kDeadlineUnreachable,
      absl::StrCat("the deadline is ", absl::FormatDuration(left), " away, ", tokens,
                   " tokens need about ",
                   absl::FormatDuration(absl::Trunc(predicted, absl::Milliseconds(1)))));
}

// The time in which the server works off as many tokens as are asked for.
absl::Duration Admission::RetryDelay(int64_t num_tokens) const {
  const std::optional<double> rate = rate_.Best();
  if (!rate) return kUnknownRetryDelay;
  return std::clamp(absl::Seconds(static_cast<double>(num_tokens) / *rate), kMinRetryDelay,
                    kMaxRetryDelay);
}

void Admission::AddMeasurement(int64_t num_tokens, absl::Duration compute) {
  MutexLock lock(&mutex_);
  rate_.Add(num_tokens, compute);
}

Load Admission::load() const {
  MutexLock lock(&mutex_);
  return load_;
}

bool Admission::WaitUntilIdle(absl::Time deadline) const {
  MutexLock lock(&mutex_);
  while (load_.inflight_requests > 0 && absl::Now() < deadline) idle_.WaitUntil(&mutex_, deadline);
  return load_.inflight_requests == 0;
}

void Admission::Start(int64_t num_tokens) {
  MutexLock lock(&mutex_);
  --load_.queued_requests;
  load_.queued_tokens -= num_tokens;
}

void Admission::Release(const Ticket& ticket) {
  MutexLock lock(&mutex_);
  if (ticket.queued_) {
    --load_.queued_requests;
    load_.queued_tokens -= ticket.num_tokens_;
  }
  --load_.inflight_requests;
  load_.inflight_tokens -= ticket.num_tokens_;
  ++load_.released;
  request_ids_.erase(ticket.request_id_);
  if (load_.inflight_requests == 0) idle_.SignalAll();
}

}  // namespace headstart
