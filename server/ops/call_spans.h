// What became of a call, as spans. No token, no text, no message of an error: names, counts, times.
#pragma once

#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "server/ops/span_exporter.h"
#include "server/rpc/call_record.h"

namespace headstart {

// Pieces of a prompt that get a span of their own; the others are in the counts.
inline constexpr size_t kMaxPieceSpans = 256;

// The span of the call first. Its names stand in server/README.md. `ended`: what the wall clock
// said at record.ended_at; the other times are as far from it as they were by the monotonic one.
std::vector<TraceSpan> SpansOf(const CallRecord& record, const absl::Status& status,
                               absl::Time ended);
std::vector<TraceSpan> SpansOf(const FetchRecord& record, const absl::Status& status,
                               absl::Time ended);

}  // namespace headstart
