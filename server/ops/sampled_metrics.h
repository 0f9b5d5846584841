// Metrics that are looked up when /metrics is asked for: the server's state, and the process.
#pragma once

#include <prometheus/metric_family.h>

#include <string>
#include <vector>

#include "server/ops/metrics.h"

namespace headstart {

std::vector<prometheus::MetricFamily> SampleServer(const std::string& model,
                                                   const MetricsSnapshot& snapshot);

// The usual process_* metrics, from /proc/self. What can't be read is left out.
std::vector<prometheus::MetricFamily> SampleProcess();

}  // namespace headstart
