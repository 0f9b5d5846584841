// A picture of a load: TTFT over time and as a distribution, by class of lengths, and the requests
// under way and waiting.
#pragma once

#include <string>

#include "absl/status/status.h"
#include "client/commands/load_report.h"

namespace headstart {

// SVG that needs nothing else.
std::string PlotSvg(const BenchCell& cell);

absl::Status WritePlot(const std::string& path, const BenchCell& cell);

}  // namespace headstart
