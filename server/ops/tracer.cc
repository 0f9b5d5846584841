#include "server/ops/tracer.h"

#include <cstdint>
#include <cstring>

#include "absl/time/clock.h"
#include "server/ops/call_spans.h"

namespace headstart {
namespace {

// The same for everyone who knows the trace.
bool IsSampled(const std::string& trace_id, double ratio) {
  uint64_t number = 0;
  std::memcpy(&number, trace_id.data() + trace_id.size() - sizeof(number), sizeof(number));
  return static_cast<double>(number >> 11) * 0x1p-53 < ratio;  // 53 bits: exact as a double
}

}  // namespace

CallTrace Tracer::Begin(const std::optional<TraceContext>& parent) const {
  CallTrace trace;
  if (parent.has_value()) {
    trace.span.trace_id = parent->trace_id;
    trace.span.sampled = exporter_ != nullptr && parent->sampled;
    trace.parent_id = parent->span_id;
  } else if (exporter_ != nullptr) {
    trace.span.trace_id = NewTraceId();
    trace.span.sampled = IsSampled(trace.span.trace_id, sample_ratio_);
  }
  if (trace.span.sampled) trace.span.span_id = NewSpanId();
  return trace;
}

void Tracer::NoteFetchId(const std::string& fetch_id, const CallTrace& prompt) {
  if (exporter_ == nullptr) return;
  MutexLock lock(&mutex_);
  if (!prompts_.emplace(fetch_id, prompt.span).second) return;
  fetch_ids_.push_back(fetch_id);
  if (fetch_ids_.size() <= kMaxFetchIds) return;
  prompts_.erase(fetch_ids_.front());
  fetch_ids_.pop_front();
}

void Tracer::Join(const std::string& fetch_id, CallTrace* fetch) const {
  MutexLock lock(&mutex_);
  const auto found = prompts_.find(fetch_id);
  if (found == prompts_.end()) return;
  const TraceContext& prompt = found->second;
  if (!fetch->parent_id.empty()) {
    if (prompt.sampled) fetch->link = prompt;
    return;
  }
  fetch->span.trace_id = prompt.trace_id;
  fetch->span.sampled = prompt.sampled;
  fetch->parent_id = prompt.span_id;
  if (prompt.sampled && fetch->span.span_id.empty()) fetch->span.span_id = NewSpanId();
}

void Tracer::End(const CallRecord& record, const absl::Status& status) const {
  if (record.trace.span.sampled) exporter_->Push(SpansOf(record, status, absl::Now()));
}

void Tracer::End(const FetchRecord& record, const absl::Status& status) const {
  if (record.trace.span.sampled) exporter_->Push(SpansOf(record, status, absl::Now()));
}

}  // namespace headstart
