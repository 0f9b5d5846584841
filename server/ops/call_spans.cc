#include "server/ops/call_spans.h"

#include <algorithm>
#include <string>

#include "engine/error.h"
#include "kernels/base/instant.h"

namespace headstart {
namespace {

// Between two pieces that follow each other at once there is the scheduler.
constexpr absl::Duration kLeastGap = absl::Microseconds(500);

using opentelemetry::proto::common::v1::AnyValue;
using opentelemetry::proto::trace::v1::Status;

AnyValue* Add(const char* key, TraceSpan* span) {
  auto* attribute = span->add_attributes();
  attribute->set_key(key);
  return attribute->mutable_value();
}
void AddText(const char* key, std::string text, TraceSpan* span) {
  Add(key, span)->set_string_value(std::move(text));
}
void AddNumber(const char* key, int64_t number, TraceSpan* span) {
  Add(key, span)->set_int_value(number);
}
void AddReal(const char* key, double number, TraceSpan* span) {
  Add(key, span)->set_double_value(number);
}

// Unix time, for what happened by the monotonic clock: one moment is known by both.
struct UnixTime {
  Instant moment;
  absl::Time wall;

  uint64_t Nanoseconds(Instant at) const {
    return static_cast<uint64_t>(std::max<int64_t>(absl::ToUnixNanos(wall + (at - moment)), 0));
  }
};

// The span of a call of ours, and under it those of its parts.
class CallSpans {
 public:
  CallSpans(const char* method, const CallTrace& trace, const absl::Status& status,
            const UnixTime& unix_time)
      : unix_time_(unix_time) {
    TraceSpan& span = spans_.emplace_back();
    span.set_trace_id(trace.span.trace_id);
    span.set_span_id(trace.span.span_id);
    span.set_parent_span_id(trace.parent_id);
    span.set_name(method);
    span.set_kind(TraceSpan::SPAN_KIND_SERVER);
    if (trace.link.has_value()) {
      auto* link = span.add_links();
      link->set_trace_id(trace.link->trace_id);
      link->set_span_id(trace.link->span_id);
    }
    AddText("rpc.system", "grpc", &span);
    AddText("rpc.service", "headstart.v1.PrefillService", &span);
    AddText("rpc.method", method, &span);
    AddNumber("rpc.grpc.status_code", static_cast<int64_t>(status.code()), &span);
    if (status.ok()) return;
    span.mutable_status()->set_code(Status::STATUS_CODE_ERROR);
    AddText("headstart.reason", std::string(ErrorReasonName(ReasonOf(status))), &span);
  }

  TraceSpan* call() { return &spans_.front(); }

  void SetTimes(Instant begin, Instant end, TraceSpan* span) const {
    span->set_start_time_unix_nano(unix_time_.Nanoseconds(begin));
    span->set_end_time_unix_nano(unix_time_.Nanoseconds(std::max(begin, end)));
  }

  void AddEvent(const char* name, Instant at) {
    auto* event = call()->add_events();
    event->set_name(name);
    event->set_time_unix_nano(unix_time_.Nanoseconds(at));
  }

  // Good until the next one is added.
  TraceSpan* AddPart(const char* name, Instant begin, Instant end) {
    TraceSpan& span = spans_.emplace_back();
    span.set_trace_id(call()->trace_id());
    span.set_span_id(NewSpanId());
    span.set_parent_span_id(call()->span_id());
    span.set_name(name);
    span.set_kind(TraceSpan::SPAN_KIND_INTERNAL);
    SetTimes(begin, end, &span);
    return &span;
  }

  void AddCopyOut(const SendRecord& sent) {
    AddNumber("headstart.chunks", sent.chunks, call());
    AddNumber("headstart.kv_bytes", sent.kv_bytes, call());
    if (sent.chunks > 0) AddPart("copy out", sent.first_chunk_at, sent.last_chunk_at);
  }

  std::vector<TraceSpan> Take() { return std::move(spans_); }

 private:
  const UnixTime unix_time_;
  std::vector<TraceSpan> spans_;
};

void AddQueue(const CallRecord& record, CallSpans* spans) {
  Instant begin = record.accepted_at;
  Instant end = record.queue.has_value() ? begin + *record.queue : record.ended_at;
  if (const PrefillResult* result = record.sent.result.get(); result != nullptr) {
    begin = result->accepted_at;
    end = result->started_at;
  }
  spans->AddEvent("accepted", begin);
  spans->AddPart("queue", begin, end);
}

// And the time between them, in which others ran or host memory was full.
void AddPieces(const std::vector<PieceRun>& pieces, CallSpans* spans) {
  const size_t count = std::min(pieces.size(), kMaxPieceSpans);
  for (size_t i = 0; i < count; ++i) {
    const PieceRun& piece = pieces[i];
    if (i > 0 && piece.begin - pieces[i - 1].end >= kLeastGap) {
      spans->AddPart("gave way", pieces[i - 1].end, piece.begin);
    }
    TraceSpan* span = spans->AddPart("piece", piece.begin, piece.end);
    AddNumber("headstart.first_position", piece.first_position, span);
    AddNumber("headstart.tokens", piece.num_tokens, span);
    AddText("headstart.source", piece.from_cache ? "cache" : "computed", span);
  }
}

void AddResult(const PrefillResult& result, CallSpans* spans) {
  TraceSpan* call = spans->call();
  spans->AddEvent("computed", result.computed_at);
  AddNumber("headstart.cached_tokens", result.cached_tokens, call);
  AddNumber("headstart.pieces", static_cast<int64_t>(result.pieces.size()), call);
  AddReal("headstart.density", DensityOf(result), call);
  AddReal("headstart.selection_seconds", result.selection_seconds, call);
  AddReal("headstart.attention_seconds", result.attention_seconds, call);
  AddReal("headstart.compute_seconds", result.compute_seconds, call);
  AddReal("headstart.gave_way_seconds", result.gave_way_seconds, call);
  AddReal("headstart.room_wait_seconds", result.room_wait_seconds, call);
}

}  // namespace

std::vector<TraceSpan> SpansOf(const CallRecord& record, const absl::Status& status,
                               absl::Time ended) {
  CallSpans spans("Prefill", record.trace, status, {record.ended_at, ended});
  spans.SetTimes(record.came_at, record.ended_at, spans.call());
  AddText("headstart.request_id", record.request_id, spans.call());
  AddNumber("headstart.prompt_tokens", record.num_tokens, spans.call());
  Add("headstart.detached", spans.call())->set_bool_value(record.detached);
  if (!record.accepted) return spans.Take();
  AddQueue(record, &spans);
  if (const PrefillResult* result = record.sent.result.get(); result != nullptr) {
    AddResult(*result, &spans);
    AddPieces(result->pieces, &spans);
  }
  spans.AddCopyOut(record.sent);
  return spans.Take();
}

std::vector<TraceSpan> SpansOf(const FetchRecord& record, const absl::Status& status,
                               absl::Time ended) {
  CallSpans spans("FetchKv", record.trace, status, {record.ended_at, ended});
  spans.SetTimes(record.came_at, record.ended_at, spans.call());
  if (!record.opened) return spans.Take();
  spans.AddEvent("opened", record.opened_at);
  AddNumber("headstart.stripe", record.part.stripe_index, spans.call());
  AddNumber("headstart.stripes", record.part.stripe_count, spans.call());
  AddNumber("headstart.from_chunk", record.from_chunk, spans.call());
  spans.AddCopyOut(record.sent);
  return spans.Take();
}

}  // namespace headstart
