#include "server/ops/call_spans.h"

#include <algorithm>
#include <string>

#include "engine/error.h"

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

uint64_t Nanoseconds(absl::Time time) {
  return static_cast<uint64_t>(std::max<int64_t>(absl::ToUnixNanos(time), 0));
}

void SetTimes(absl::Time begin, absl::Time end, TraceSpan* span) {
  span->set_start_time_unix_nano(Nanoseconds(begin));
  span->set_end_time_unix_nano(Nanoseconds(std::max(begin, end)));
}

void AddEvent(const char* name, absl::Time at, TraceSpan* span) {
  auto* event = span->add_events();
  event->set_name(name);
  event->set_time_unix_nano(Nanoseconds(at));
}

// The span of a call of ours, and under it those of its parts.
class CallSpans {
 public:
  CallSpans(const char* method, const CallTrace& trace, const absl::Status& status) {
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

  // Good until the next one is added.
  TraceSpan* AddPart(const char* name, absl::Time begin, absl::Time end) {
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
  std::vector<TraceSpan> spans_;
};

void AddQueue(const CallRecord& record, CallSpans* spans) {
  absl::Time begin = record.accepted_at;
  absl::Time end = record.queue.has_value() ? begin + *record.queue : record.ended_at;
  if (const PrefillResult* result = record.sent.result.get(); result != nullptr) {
    begin = result->accepted_at;
    end = result->started_at;
  }
  AddEvent("accepted", begin, spans->call());
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

void AddResult(const PrefillResult& result, TraceSpan* call) {
  AddEvent("computed", result.computed_at, call);
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

std::vector<TraceSpan> SpansOf(const CallRecord& record, const absl::Status& status) {
  CallSpans spans("Prefill", record.trace, status);
  SetTimes(record.came_at, record.ended_at, spans.call());
  AddText("headstart.request_id", record.request_id, spans.call());
  AddNumber("headstart.prompt_tokens", record.num_tokens, spans.call());
  Add("headstart.detached", spans.call())->set_bool_value(record.detached);
  if (!record.accepted) return spans.Take();
  AddQueue(record, &spans);
  if (const PrefillResult* result = record.sent.result.get(); result != nullptr) {
    AddResult(*result, spans.call());
    AddPieces(result->pieces, &spans);
  }
  spans.AddCopyOut(record.sent);
  return spans.Take();
}

std::vector<TraceSpan> SpansOf(const FetchRecord& record, const absl::Status& status) {
  CallSpans spans("FetchKv", record.trace, status);
  SetTimes(record.came_at, record.ended_at, spans.call());
  if (!record.opened) return spans.Take();
  AddEvent("opened", record.opened_at, spans.call());
  AddNumber("headstart.stripe", record.part.stripe_index, spans.call());
  AddNumber("headstart.stripes", record.part.stripe_count, spans.call());
  AddNumber("headstart.from_chunk", record.from_chunk, spans.call());
  spans.AddCopyOut(record.sent);
  return spans.Take();
}

}  // namespace headstart
