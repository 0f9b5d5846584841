// What came of a request, for people and for programs.
#pragma once

#include <nlohmann/json.hpp>
#include <string>

#include "absl/time/time.h"
#include "client/prefill_client.h"

namespace headstart {

// Where the time went, KV and its rate, sparsity per layer as a bar chart, first token. Lines end
// with '\n'.
std::string FormatReport(const PrefillOutcome& outcome);

// The same as one object; seconds, bytes.
nlohmann::json ReportJson(const PrefillOutcome& outcome);

// What the server says would become of a request; the same as one object, null: not known.
std::string FormatEstimate(const v1::EstimateResponse& estimate);
nlohmann::json EstimateJson(const v1::EstimateResponse& estimate);

double Seconds(const google::protobuf::Duration& duration);
// JSON's null where the time is not known.
nlohmann::json SecondsOrNull(bool known, const google::protobuf::Duration& duration);

// Executed share of the causal attention blocks of all layers.
double Density(const v1::Completed& completed);

// What shipping added to the time, as the server says.
absl::Duration ExposedTransfer(const v1::Completed& completed);

// KV bytes per second from the manifest, when compute starts, to the last chunk; in 1e9.
double KvGigabytesPerSecond(const PrefillOutcome& outcome);

}  // namespace headstart
