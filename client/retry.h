// When something is tried again, and after what pause.
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "client/cancel_token.h"
#include "client/client_options.h"
#include "kernels/base/instant.h"

namespace headstart {

// UNAVAILABLE, and a full queue where that is wanted.
bool MayRetry(const absl::Status& status, const RetryOptions& retry);

// Pauses after the `failures`-th failure in a row. OK: try again; else what is to be returned:
// `why` when that was the last attempt or the next one would be past the deadline, CANCELLED.
absl::Status PauseBeforeRetry(const absl::Status& why, int failures, const RetryOptions& retry,
                              Instant deadline, const CancelToken& cancel);

// A stream that had begun to deliver and was then ended by anything but the server's own word, the
// caller or the clock is broken for good: what came is incomplete and nobody vouches for it.
absl::Status StatusAfterChunks(const absl::Status& status, int64_t num_chunks);

}  // namespace headstart
