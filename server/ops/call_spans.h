// What became of a call, as spans. No token, no text, no message of an error: names, counts, times.
#pragma once

#include <vector>

#include "absl/status/status.h"
#include "server/ops/span_exporter.h"
#include "server/rpc/call_record.h"

namespace headstart {

// Pieces of a prompt that get a span of their own; the others are in the counts.
inline constexpr size_t kMaxPieceSpans = 256;

// The span of the call first. Its names stand in server/README.md.
std::vector<TraceSpan> SpansOf(const CallRecord& record, const absl::Status& status);
std::vector<TraceSpan> SpansOf(const FetchRecord& record, const absl::Status& status);

}  // namespace headstart
