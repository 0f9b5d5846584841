// Names of traces and spans, and who a span's parent is (W3C Trace Context).
#pragma once

#include <optional>
#include <string>

#include "absl/strings/string_view.h"

namespace headstart {

// A span, as others name it.
struct TraceContext {
  std::string trace_id;  // 16 bytes
  std::string span_id;   // 8 bytes
  bool sampled = false;

  friend bool operator==(const TraceContext&, const TraceContext&) = default;
};

// Of a traceparent of version 00; none unless every digit is right.
std::optional<TraceContext> ParseTraceParent(absl::string_view text);

// The trace that a call belongs to, and the span that it is there.
struct CallTrace {
  TraceContext span;                 // trace_id is empty: nobody has said
  std::string parent_id;             // span id; empty: the root of its trace
  std::optional<TraceContext> link;  // another span that it has to do with
};

// Random, never all zero.
std::string NewTraceId();
std::string NewSpanId();

}  // namespace headstart
