// Sends spans to a collector of OpenTelemetry: OTLP over gRPC.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "server/ops/span_exporter.h"

namespace headstart {

// host:port or http://host:port: plain text; https://host:port: TLS with the system's roots.
struct OtlpEndpoint {
  std::string address;  // host:port
  bool tls = false;

  friend bool operator==(const OtlpEndpoint&, const OtlpEndpoint&) = default;
};
// INVALID_ARGUMENT names the text.
absl::StatusOr<OtlpEndpoint> ParseOtlpEndpoint(const std::string& text);

// Connects when it first sends, and again when that broke.
std::unique_ptr<SpanSink> MakeOtlpSink(const OtlpEndpoint& endpoint);

}  // namespace headstart
