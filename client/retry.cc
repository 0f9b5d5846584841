#include "client/retry.h"

#include <algorithm>

#include "absl/random/random.h"
#include "absl/strings/str_cat.h"
#include "client/grpc_status.h"
#include "kernels/base/instant.h"

namespace headstart {
namespace {

absl::Duration RetryPause(const absl::Status& status, const RetryOptions& retry, int failures) {
  if (const auto told = RetryDelayOf(status)) return *told;
  absl::Duration pause = retry.initial_backoff;
  for (int i = 1; i < failures && pause < retry.max_backoff; ++i) pause *= 2;
  absl::BitGen random;
  return std::min(pause, retry.max_backoff) * absl::Uniform(random, 0.8, 1.2);
}

}  // namespace

bool MayRetry(const absl::Status& status, const RetryOptions& retry) {
  if (absl::IsUnavailable(status)) return true;
  return retry.when_queue_full && absl::IsResourceExhausted(status) &&
         ErrorReasonOf(status) == "QUEUE_FULL";
}

absl::Status PauseBeforeRetry(const absl::Status& why, int failures, const RetryOptions& retry,
                              Instant deadline, const CancelToken& cancel) {
  if (failures >= retry.max_attempts) return why;
  const absl::Duration pause = RetryPause(why, retry, failures);
  const Instant next = Instant::Now() + pause;
  if (next >= deadline) return why;
  if (retry.on_retry) retry.on_retry(why, pause);
  if (cancel.SleepUntil(next)) return absl::OkStatus();
  return absl::CancelledError("cancelled between two attempts");
}

absl::Status StatusAfterChunks(const absl::Status& status, int64_t num_chunks) {
  const bool vouched = ErrorInfoOf(status).has_value() || absl::IsCancelled(status) ||
                       absl::IsDeadlineExceeded(status);
  if (status.ok() || vouched || num_chunks == 0) return status;
  return absl::DataLossError(
      absl::StrCat("the stream broke after ", num_chunks, " chunks: ", status.ToString()));
}

}  // namespace headstart
