#include "engine/error.h"

#include <array>
#include <string>

#include "absl/strings/cord.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "kernels/base/nonfinite.h"

namespace headstart {
namespace {

constexpr absl::string_view kReasonPayload = "headstart/reason";
constexpr absl::string_view kRetryPayload = "headstart/retry-microseconds";

constexpr absl::string_view kUsagePayload = "headstart/usage";

constexpr std::array<absl::string_view, kNumErrorReasons> kNames = {
    "NONE",
    "MALFORMED_REQUEST",
    "INVALID_FIELD",
    "UNKNOWN_MODEL",
    "KV_DTYPE_UNAVAILABLE",
    "PROMPT_EXCEEDS_POOL",
    "DUPLICATE_REQUEST_ID",
    "QUEUE_FULL",
    "OUT_OF_MEMORY",
    "DRAINING",
    "DEADLINE_EXCEEDED",
    "DEADLINE_UNREACHABLE",
    "CLIENT_CANCELLED",
    "CLIENT_STALLED",
    "NONFINITE_OUTPUT",
    "INTERNAL",
    "LOADING",
    "ENGINE_LOST",
    "PEER_NOT_ALLOWED",
    "UNKNOWN_FETCH_ID",
    "KV_GONE",
    "KV_RELEASED",
    "LEASE_EXPIRED",
    "HOST_MEMORY_FULL",
};

std::optional<int64_t> NumberPayload(const absl::Status& status, absl::string_view name) {
  const auto payload = status.GetPayload(name);
  int64_t number = 0;
  if (!payload || !absl::SimpleAtoi(std::string(*payload), &number)) return std::nullopt;
  return number;
}

ErrorReason ReasonOfCode(const absl::Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kOk:
      return ErrorReason::kNone;
    case absl::StatusCode::kInvalidArgument:
      return ErrorReason::kInvalidField;
    case absl::StatusCode::kFailedPrecondition:
      return ErrorReason::kPromptExceedsPool;
    case absl::StatusCode::kResourceExhausted:
      return ErrorReason::kOutOfMemory;
    case absl::StatusCode::kCancelled:
      return ErrorReason::kClientCancelled;
    case absl::StatusCode::kDeadlineExceeded:
      return ErrorReason::kDeadlineExceeded;
    default:
      return IsNonFiniteError(status) ? ErrorReason::kNonfiniteOutput : ErrorReason::kInternal;
  }
}

}  // namespace

absl::string_view ErrorReasonName(ErrorReason reason) {
  return kNames[static_cast<size_t>(reason)];
}

absl::Status MakeError(absl::StatusCode code, ErrorReason reason, absl::string_view message) {
  absl::Status status(code, message);
  status.SetPayload(kReasonPayload, absl::Cord(absl::StrCat(static_cast<int>(reason))));
  return status;
}

absl::Status MakeRetryableError(absl::StatusCode code, ErrorReason reason,
                                absl::string_view message, absl::Duration retry_delay) {
  absl::Status status = MakeError(code, reason, message);
  status.SetPayload(kRetryPayload,
                    absl::Cord(absl::StrCat(absl::ToInt64Microseconds(retry_delay))));
  return status;
}

ErrorReason ReasonOf(const absl::Status& status) {
  const std::optional<int64_t> reason = NumberPayload(status, kReasonPayload);
  return reason ? static_cast<ErrorReason>(*reason) : ReasonOfCode(status);
}

std::optional<absl::Duration> RetryAfter(const absl::Status& status) {
  const std::optional<int64_t> delay_us = NumberPayload(status, kRetryPayload);
  if (!delay_us) return std::nullopt;
  return absl::Microseconds(*delay_us);
}

absl::Status AsUsageError(absl::Status status) {
  status.SetPayload(kUsagePayload, absl::Cord());
  return status;
}

bool IsUsageError(const absl::Status& status) {
  return status.GetPayload(kUsagePayload).has_value();
}

}  // namespace headstart
