// Why a request was refused or ended, where the status code alone doesn't say. The reason travels
// as a payload of absl::Status; rich_status.h puts it on the wire.
#pragma once

#include <cstdint>
#include <optional>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"

namespace headstart {

// The values of headstart.v1.ErrorReason, without protobuf. kNone: the request ended well.
enum class ErrorReason : uint8_t {
  kNone = 0,
  kMalformedRequest = 1,
  kInvalidField = 2,
  kUnknownModel = 3,
  kKvDtypeUnavailable = 4,
  kPromptExceedsPool = 5,
  kDuplicateRequestId = 6,
  kQueueFull = 7,
  kOutOfMemory = 8,
  kDraining = 9,
  kDeadlineExceeded = 10,
  kDeadlineUnreachable = 11,
  kClientCancelled = 12,
  kClientStalled = 13,
  kNonfiniteOutput = 14,
  kInternal = 15,
  kLoading = 16,
  kEngineLost = 17,
  kPeerNotAllowed = 18,
  kUnknownFetchId = 19,
  kKvGone = 20,
  kKvReleased = 21,
  kLeaseExpired = 22,
  kHostMemoryFull = 23,
};
inline constexpr int kNumErrorReasons = 24;

// "QUEUE_FULL"; "NONE" for kNone.
absl::string_view ErrorReasonName(ErrorReason reason);

absl::Status MakeError(absl::StatusCode code, ErrorReason reason, absl::string_view message);

// As MakeError, for a request that is worth sending again after `retry_delay`.
absl::Status MakeRetryableError(absl::StatusCode code, ErrorReason reason,
                                absl::string_view message, absl::Duration retry_delay);

// What MakeError was given. A status from elsewhere (engine, sink) has the reason that its code
// stands for.
ErrorReason ReasonOf(const absl::Status& status);

std::optional<absl::Duration> RetryAfter(const absl::Status& status);

// Marks an error as the operator's: a flag that does not suit the model or the machine.
absl::Status AsUsageError(absl::Status status);
bool IsUsageError(const absl::Status& status);

}  // namespace headstart
