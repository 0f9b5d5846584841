// Which calls are traced, and as part of which trace.
#pragma once

#include <deque>
#include <optional>
#include <string>
#include <unordered_map>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "kernels/base/mutex.h"
#include "server/ops/span_exporter.h"
#include "server/ops/trace_context.h"
#include "server/rpc/call_record.h"

namespace headstart {

// Thread-safe.
class Tracer {
 public:
  // `exporter` outlives the tracer; null: nothing is traced, and calls only keep the trace that
  // they bring. `sample_ratio`: of calls that bring none.
  Tracer(double sample_ratio, SpanExporter* exporter)
      : sample_ratio_(sample_ratio), exporter_(exporter) {}

  // A call came, with the context that it brought.
  CallTrace Begin(const std::optional<TraceContext>& parent) const;
  // A prompt's KV may be fetched under this id. The last kMaxFetchIds are known.
  static constexpr size_t kMaxFetchIds = 4096;
  void NoteFetchId(const std::string& fetch_id, const CallTrace& prompt);
  // A fetch of that KV: a part of its prompt's trace, or, where it brought one of its own, linked
  // to it.
  void Join(const std::string& fetch_id, CallTrace* fetch) const;

  // A call ended.
  void End(const CallRecord& record, const absl::Status& status) const;
  void End(const FetchRecord& record, const absl::Status& status) const;

 private:
  const double sample_ratio_;
  SpanExporter* const exporter_;
  mutable Mutex mutex_;
  std::unordered_map<std::string, TraceContext> prompts_ ABSL_GUARDED_BY(mutex_);  // by fetch id
  std::deque<std::string> fetch_ids_ ABSL_GUARDED_BY(mutex_);                      // oldest first
};

}  // namespace headstart
