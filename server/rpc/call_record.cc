#include "server/rpc/call_record.h"

#include <algorithm>

#include "absl/strings/escaping.h"
#include "engine/error.h"
#include "kernels/base/instant.h"
#include "server/ops/logging.h"

namespace headstart {
namespace {

double Milliseconds(absl::Duration duration) { return absl::ToDoubleMilliseconds(duration); }

LogLevel LevelOf(const absl::Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kInternal:
    case absl::StatusCode::kUnknown:
      return LogLevel::kError;
    default:
      return LogLevel::kInfo;
  }
}

void LogComputed(const CallRecord& r) {
  const PrefillResult& result = *r.sent.result;
  const TimeShares shares = ShareTime(result, r.ended_at);
  Log(LogLevel::kInfo, "prefill",
      {{"request_id", r.request_id},
       {"code", "OK"},
       {"peer", r.peer},
       {"trace_id", absl::BytesToHexString(r.trace.span.trace_id)},
       {"tokens", r.num_tokens},
       {"detached", r.detached},
       {"density", DensityOf(result)},
       {"total_ms", Milliseconds(r.total())},
       {"queue_ms", Milliseconds(shares.queue)},
       {"selection_ms", Milliseconds(shares.selection)},
       {"attention_ms", Milliseconds(shares.attention)},
       {"other_compute_ms", Milliseconds(shares.other_compute)},
       {"exposed_transfer_ms", Milliseconds(shares.exposed_transfer)},
       {"gave_way_ms", Milliseconds(shares.gave_way)},
       {"cached_tokens", result.cached_tokens},
       {"chunks", r.sent.chunks},
       {"kv_bytes", r.sent.kv_bytes}});
}

}  // namespace

double DensityOf(const PrefillResult& result) {
  if (result.causal_blocks == 0) return 1.0;
  return static_cast<double>(result.executed_blocks) / static_cast<double>(result.causal_blocks);
}

TimeShares ShareTime(const PrefillResult& result, Instant now) {
  const absl::Duration total = now - result.accepted_at;
  TimeShares shares;
  shares.queue = result.started_at - result.accepted_at;
  shares.selection = absl::Seconds(result.selection_seconds);
  shares.attention = absl::Seconds(result.attention_seconds);
  const absl::Duration compute =
      std::min(absl::Seconds(result.compute_seconds), total - shares.queue);
  shares.other_compute =
      std::max(compute - shares.selection - shares.attention, absl::ZeroDuration());
  shares.gave_way = std::clamp(absl::Seconds(result.gave_way_seconds), absl::ZeroDuration(),
                               total - shares.queue - shares.compute());
  shares.exposed_transfer = total - shares.queue - shares.compute() - shares.gave_way;
  return shares;
}

absl::Duration ExposedTransfer(const SendRecord& sent, Instant opened_at) {
  const Instant since = std::max(sent.result->computed_at, opened_at);
  return std::max(sent.last_chunk_at - since, absl::ZeroDuration());
}

void LogCall(const CallRecord& r, const absl::Status& status) {
  if (status.ok()) return LogComputed(r);
  Log(LevelOf(status), "prefill",
      {{"request_id", r.request_id},
       {"code", absl::StatusCodeToString(status.code())},
       {"reason", ErrorReasonName(ReasonOf(status))},
       {"message", status.message()},
       {"peer", r.peer},
       {"trace_id", absl::BytesToHexString(r.trace.span.trace_id)},
       {"accepted", r.accepted},
       {"tokens", r.num_tokens},
       {"total_ms", r.accepted ? Milliseconds(r.total()) : 0.0},
       {"chunks", r.sent.chunks},
       {"kv_bytes", r.sent.kv_bytes}});
}

void LogFetch(const FetchRecord& r, const absl::Status& status) {
  Log(LevelOf(status), "fetch",
      {{"code", absl::StatusCodeToString(status.code())},
       {"reason", ErrorReasonName(ReasonOf(status))},
       {"message", status.message()},
       {"peer", r.peer},
       {"trace_id", absl::BytesToHexString(r.trace.span.trace_id)},
       {"opened", r.opened},
       {"stripe", r.part.stripe_index},
       {"stripes", r.part.stripe_count},
       {"from_chunk", r.from_chunk},
       {"chunks", r.sent.chunks},
       {"kv_bytes", r.sent.kv_bytes}});
}

}  // namespace headstart
