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

// Executed share of the causal attention blocks of all layers.
double Density(const v1::Completed& completed);

// What shipping added to the time, as the server says.
absl::Duration ExposedTransfer(const v1::Completed& completed);

// KV bytes per second from the manifest, when compute starts, to the last chunk; in 1e9.
double KvGigabytesPerSecond(const PrefillOutcome& outcome);

}  // namespace headstart
