#include "client/commands/loads_command.h"

#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/str_format.h"
#include "client/commands/command_flags.h"
#include "client/commands/request_report.h"
#include "client/prefill_client.h"
#include "kernels/base/status_macros.h"

namespace headstart {
namespace {

struct LoadsOptions {
  PrefillClientOptions client;
  bool json = false;
};

double Share(uint64_t part, uint64_t whole) {
  return whole == 0 ? 0.0 : 100.0 * static_cast<double>(part) / static_cast<double>(whole);
}

std::string FormatLoads(const v1::GetLoadsResponse& loads) {
  std::string text = absl::StrFormat("model %s  %s\n", absl::Utf8SafeCEscape(loads.model()),
                                     loads.accepting() ? "accepting" : "not accepting");
  const auto add = [&text](const char* name, uint64_t requests, uint64_t tokens) {
    absl::StrAppendFormat(&text, "%-10s %8d requests  %12d tokens\n", name, requests, tokens);
  };
  add("queued", loads.queued_requests(), loads.queued_tokens());
  add("in flight", loads.inflight_requests(), loads.inflight_tokens());
  add("limit", loads.max_requests(), loads.max_tokens());
  absl::StrAppendFormat(
      &text, "speed      %8.0f tokens/s  all computed %s\n", loads.tokens_per_second(),
      loads.has_predicted_drain() ? absl::StrFormat("in %.3f s", Seconds(loads.predicted_drain()))
                                  : "at a time not known yet");
  absl::StrAppendFormat(&text, "KV pool    %8d tokens  %5.1f %% in use, %.1f %% cached\n",
                        loads.kv_pool_tokens(),
                        Share(loads.kv_pool_used_tokens(), loads.kv_pool_tokens()),
                        Share(loads.kv_pool_cached_tokens(), loads.kv_pool_tokens()));
  absl::StrAppendFormat(&text, "host KV    %8.1f MB  %5.1f %% in use, %d leases\n",
                        static_cast<double>(loads.host_kv_bytes()) / 1e6,
                        Share(loads.host_kv_used_bytes(), loads.host_kv_bytes()), loads.leases());
  absl::StrAppendFormat(&text, "prefix     %8.1f %% of %d prompt tokens came from the cache\n",
                        Share(loads.cached_tokens_total(), loads.prompt_tokens_total()),
                        loads.prompt_tokens_total());
  return text;
}

nlohmann::json LoadsJson(const v1::GetLoadsResponse& loads) {
  return {{"model", loads.model()},
          {"accepting", loads.accepting()},
          {"queued_requests", loads.queued_requests()},
          {"queued_tokens", loads.queued_tokens()},
          {"inflight_requests", loads.inflight_requests()},
          {"inflight_tokens", loads.inflight_tokens()},
          {"max_requests", loads.max_requests()},
          {"max_tokens", loads.max_tokens()},
          {"predicted_drain_seconds",
           SecondsOrNull(loads.has_predicted_drain(), loads.predicted_drain())},
          {"tokens_per_second", loads.tokens_per_second()},
          {"kv_pool_tokens", loads.kv_pool_tokens()},
          {"kv_pool_used_tokens", loads.kv_pool_used_tokens()},
          {"kv_pool_cached_tokens", loads.kv_pool_cached_tokens()},
          {"host_kv_bytes", loads.host_kv_bytes()},
          {"host_kv_used_bytes", loads.host_kv_used_bytes()},
          {"leases", loads.leases()},
          {"prompt_tokens_total", loads.prompt_tokens_total()},
          {"cached_tokens_total", loads.cached_tokens_total()}};
}

absl::Status RunLoads(const LoadsOptions& options) {
  HEADSTART_ASSIGN_OR_RETURN(const auto client, PrefillClient::Create(options.client));
  HEADSTART_ASSIGN_OR_RETURN(const v1::GetLoadsResponse loads, client->GetLoads());
  std::cout << (options.json ? LoadsJson(loads).dump(2) + "\n" : FormatLoads(loads)) << std::flush;
  return absl::OkStatus();
}

}  // namespace

void AddLoadsCommand(CLI::App& app, std::function<void(int)> set_exit_code) {
  auto options = std::make_shared<LoadsOptions>();
  CLI::App& command = *app.add_subcommand("loads", "Show how busy a server is");
  AddConnectionFlags(command, &options->client);
  command.add_flag("--json", options->json, "Print JSON instead of a table");
  command.final_callback([options, set_exit_code = std::move(set_exit_code)] {
    set_exit_code(ReportStatus("headstart loads", RunLoads(*options)));
  });
}

}  // namespace headstart
