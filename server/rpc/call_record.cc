#include "server/rpc/call_record.h"

#include <algorithm>

#include "server/error.h"
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
  const TimeShares shares = ShareTime(*r.queue, *r.result, r.total);
  const double density = r.result->causal_blocks == 0
                             ? 1.0
                             : static_cast<double>(r.result->executed_blocks) /
                                   static_cast<double>(r.result->causal_blocks);
  Log(LogLevel::kInfo, "prefill",
      {{"request_id", r.request_id},
       {"code", "OK"},
       {"peer", r.peer},
       {"trace_id", r.trace_id},
       {"tokens", r.num_tokens},
       {"density", density},
       {"total_ms", Milliseconds(r.total)},
       {"queue_ms", Milliseconds(shares.queue)},
       {"selection_ms", Milliseconds(shares.selection)},
       {"attention_ms", Milliseconds(shares.attention)},
       {"other_compute_ms", Milliseconds(shares.other_compute)},
       {"exposed_transfer_ms", Milliseconds(shares.exposed_transfer)},
       {"chunks", r.chunks_sent},
       {"kv_bytes", r.kv_bytes_sent}});
}

}  // namespace

TimeShares ShareTime(absl::Duration queue, const PrefillResult& result, absl::Duration total) {
  TimeShares shares;
  shares.queue = queue;
  shares.selection = absl::Seconds(result.selection_seconds);
  shares.attention = absl::Seconds(result.attention_seconds);
  const absl::Duration compute =
      std::min(absl::Seconds(result.total_seconds - result.sink_seconds), total - queue);
  shares.other_compute =
      std::max(compute - shares.selection - shares.attention, absl::ZeroDuration());
  shares.exposed_transfer = total - queue - shares.compute();
  return shares;
}

void LogCall(const CallRecord& r, const absl::Status& status) {
  if (status.ok()) return LogComputed(r);
  Log(LevelOf(status), "prefill",
      {{"request_id", r.request_id},
       {"code", absl::StatusCodeToString(status.code())},
       {"reason", ErrorReasonName(ReasonOf(status))},
       {"message", status.message()},
       {"peer", r.peer},
       {"trace_id", r.trace_id},
       {"accepted", r.accepted},
       {"tokens", r.num_tokens},
       {"total_ms", Milliseconds(r.total)},
       {"chunks", r.chunks_sent},
       {"kv_bytes", r.kv_bytes_sent}});
}

}  // namespace headstart
