#include "server/ops/status_report.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "kernels/base/instant.h"
#include "server/version.h"

namespace headstart {
namespace {

using nlohmann::json;

// Digits beyond these only make the text longer.
double Microseconds(absl::Duration time) {
  return std::round(absl::ToDoubleMicroseconds(time)) / 1e6;
}
double Thousandths(double ratio) { return std::round(ratio * 1e3) / 1e3; }

json ToJson(const std::vector<float>& ratios) {
  json out = json::array();
  for (const float ratio : ratios) out.push_back(Thousandths(ratio));
  return out;
}

const char* NameOf(RequestState state) {
  switch (state) {
    case RequestState::kWaiting:
      return "waiting";
    case RequestState::kComputing:
      return "computing";
    case RequestState::kPaused:
      return "paused";
    case RequestState::kShipping:
      return "shipping";
    case RequestState::kKept:
      return "lease";
  }
  return "";
}

json ToJson(const RequestView& request, Instant now) {
  return {
      {"request_id", request.request_id}, {"tokens", request.num_tokens},
      {"priority", request.priority},     {"position", request.position},
      {"state", NameOf(request.state)},   {"age_seconds", Microseconds(now - request.accepted_at)}};
}

json ToJson(const TimeShares& shares) {
  return {{"queue", Microseconds(shares.queue)},
          {"selection", Microseconds(shares.selection)},
          {"attention", Microseconds(shares.attention)},
          {"other_compute", Microseconds(shares.other_compute)},
          {"gave_way", Microseconds(shares.gave_way)},
          {"exposed_transfer", Microseconds(shares.exposed_transfer)}};
}

json ToJson(const RecentPrompt& prompt, Instant now) {
  return {{"number", prompt.number},
          {"request_id", prompt.request_id},
          {"code", absl::StatusCodeToString(prompt.code)},
          {"reason", std::string(ErrorReasonName(prompt.reason))},
          {"tokens", prompt.num_tokens},
          {"cached_tokens", prompt.cached_tokens},
          {"detached", prompt.detached},
          {"ended_seconds_ago", Microseconds(now - prompt.ended_at)},
          {"total_seconds", Microseconds(prompt.total)},
          {"ttft_seconds", prompt.shares ? ToJson(*prompt.shares) : json()},
          {"density", Thousandths(prompt.density)},
          {"layer_density", ToJson(prompt.layer_density)}};
}

// [layer][head] of the last prompt that has any.
json HeadBudget(const StatusReport& report) {
  const auto last = std::find_if(report.prompts.rbegin(), report.prompts.rend(),
                                 [](const auto& prompt) { return prompt->is_sparse(); });
  if (last == report.prompts.rend()) return nullptr;
  const std::vector<float>& budget = (*last)->layer_head_budget;
  const size_t heads = budget.size() / (*last)->layer_density.size();
  json layers = json::array();
  for (auto row = budget.begin(); row != budget.end(); row += static_cast<ptrdiff_t>(heads)) {
    layers.push_back(ToJson(std::vector<float>(row, row + static_cast<ptrdiff_t>(heads))));
  }
  return {{"request_id", (*last)->request_id}, {"tokens", (*last)->num_tokens}, {"layers", layers}};
}

json ServerOf(const StatusReport& report) {
  return {{"version", kVersion},
          {"model", report.model},
          {"model_hash", report.facts.model_hash},
          {"architecture", report.facts.architecture},
          {"kv_dtype", report.facts.kv_dtype},
          {"backend", report.facts.backend},
          {"device", report.facts.device},
          {"layers", report.facts.num_layers},
          {"phase", report.phase},
          {"ready", report.state.ready},
          {"uptime_seconds", Microseconds(report.uptime)}};
}

json LoadOf(const MetricsSnapshot& state) {
  const SchedulerLoad& load = state.load;
  return {{"queued_requests", load.queued_requests},
          {"queued_tokens", load.queued_tokens},
          {"inflight_requests", load.inflight_requests},
          {"inflight_tokens", load.inflight_tokens},
          {"waiting_for_room", load.waiting_for_room},
          {"leases", load.leases},
          {"max_requests", state.max_queue_requests},
          {"max_tokens", state.max_queue_tokens},
          {"connections", state.connections}};
}

}  // namespace

std::string StatusJson(const StatusReport& report) {
  json requests = json::array(), prompts = json::array();
  for (const RequestView& request : report.requests)
    requests.push_back(ToJson(request, report.now));
  for (const auto& prompt : report.prompts) prompts.push_back(ToJson(*prompt, report.now));
  const MetricsSnapshot& state = report.state;
  const json all = {
      {"server", ServerOf(report)},
      {"load", LoadOf(state)},
      {"totals",
       {{"requests", state.load.released},
        {"prompt_tokens", report.totals.prompt_tokens},
        {"kv_bytes", report.totals.kv_bytes},
        {"layers", state.layers_done}}},
      {"pages",
       {{"all", state.pool_blocks}, {"free", state.pool_free}, {"cached", state.pool_cached}}},
      {"host_bytes", {{"all", state.host_kv_bytes}, {"free", state.host_kv_free_bytes}}},
      {"requests", requests},
      {"prompts", prompts},
      {"head_budget", HeadBudget(report)}};
  return all.dump(-1, ' ', false, json::error_handler_t::replace) + "\n";
}

}  // namespace headstart
