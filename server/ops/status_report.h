// What the status page shows, as JSON: /status.json.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "engine/request.h"
#include "kernels/base/instant.h"
#include "server/ops/metrics.h"
#include "server/ops/recent_prompts.h"

namespace headstart {

struct StatusReport {
  // At most so many requests are listed; `state.load` counts all.
  static constexpr size_t kMaxRequests = 200;

  Instant now;
  absl::Duration uptime;
  std::string model;
  std::string phase;
  ModelFacts facts;  // empty until the model is loaded
  MetricsSnapshot state;
  MetricTotals totals;
  std::vector<RequestView> requests;
  std::vector<std::shared_ptr<const RecentPrompt>> prompts;
};

// Its fields are a contract with status_page.html, and stand in server/README.md. Times in seconds.
// What is not UTF-8 is replaced.
std::string StatusJson(const StatusReport& report);

// The page that draws it: HTML that needs nothing but /status.json.
std::string StatusPage();

}  // namespace headstart
