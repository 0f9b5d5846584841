#include "client/commands/bench_command.h"

#include <algorithm>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "client/commands/command_flags.h"
#include "client/commands/load.h"
#include "client/commands/request_report.h"
#include "client/commands/token_ids.h"
#include "client/grpc_status.h"
#include "client/prefill_client.h"

namespace headstart {
namespace {

struct BenchOptions {
  PrefillClientOptions client;
  v1::PrefillRequest request;  // with the attention asked for
  std::vector<int64_t> lengths = {1024};
  std::vector<std::string> presets = {"default"};
  std::string tokens_file;
  LoadOptions load;
  int64_t warmup = 1;
  bool json = false;
};

// A length and a preset: one line of the table.
struct BenchCell {
  std::string preset;
  int64_t length = 0;
  LoadResult result;
  LoadSummary summary;
};

class Bench {
 public:
  explicit Bench(const BenchOptions& options) : options_(options) {}

  // Connects, and finds out what a prompt may be.
  absl::Status Prepare();
  BenchCell Run(const std::string& preset, int64_t length) const;
  nlohmann::json ServerJson() const;

 private:
  v1::PrefillRequest MakeRequest(const std::string& preset, int64_t length, int64_t index) const;
  LoadSample Send(const v1::PrefillRequest& request, int worker) const;

  const BenchOptions& options_;
  std::vector<std::unique_ptr<PrefillClient>> clients_;
  v1::GetModelInfoResponse model_;
  v1::GetServerInfoResponse server_;
  std::vector<uint32_t> text_;  // from the tokens file
};

absl::Status Bench::Prepare() {
  PrefillClientOptions client_options = options_.client;
  client_options.retry.max_attempts = 1;  // a refusal is a result
  const bool open_loop = options_.load.rate_per_second > 0;
  const int connections =
      open_loop ? std::min(options_.load.max_outstanding, 8) : options_.load.concurrency;
  for (int i = 0; i < connections; ++i) {
    auto client = PrefillClient::Create(client_options);
    if (!client.ok()) return client.status();
    clients_.push_back(*std::move(client));
  }
  auto model = clients_[0]->GetModelInfo();
  if (!model.ok()) return model.status();
  auto server = clients_[0]->GetServerInfo();
  if (!server.ok()) return server.status();
  model_ = *std::move(model);
  server_ = *std::move(server);
  if (model_.vocab_size() == 0) return absl::DataLossError("the server's model has no vocabulary");
  if (options_.tokens_file.empty()) return absl::OkStatus();
  auto text = ReadTokenIds(options_.tokens_file);
  if (!text.ok()) return text.status();
  text_ = *std::move(text);
  const int64_t longest = *std::max_element(options_.lengths.begin(), options_.lengths.end());
  if (static_cast<int64_t>(text_.size()) >= longest) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(options_.tokens_file, " has ", text_.size(),
                                                 " tokens, --lengths wants ", longest));
}

v1::PrefillRequest Bench::MakeRequest(const std::string& preset, int64_t length,
                                      int64_t index) const {
  // Single values mean nothing to dense attention.
  v1::PrefillRequest request = preset == "exact" ? v1::PrefillRequest() : options_.request;
  if (preset != "default") request.mutable_attention()->set_preset(PresetNamed(preset));
  const std::vector<uint32_t> ids =
      text_.empty() ? RandomTokenIds(length, model_.vocab_size(),
                                     options_.load.seed + static_cast<uint64_t>(index))
                    : std::vector<uint32_t>(text_.begin(), text_.begin() + length);
  request.mutable_token_ids()->Add(ids.begin(), ids.end());
  return request;
}

LoadSample Bench::Send(const v1::PrefillRequest& request, int worker) const {
  LoadSample sample;
  absl::StatusOr<PrefillOutcome> outcome = clients_[worker % clients_.size()]->Prefill(request, {});
  if (!outcome.ok()) {
    const absl::Status& status = outcome.status();
    const std::string reason = ErrorReasonOf(status);
    sample.error =
        absl::StrCat(absl::StatusCodeToString(status.code()), reason.empty() ? "" : " ", reason);
    sample.message = DescribeStatus(status);
    return sample;
  }
  sample.ttft = outcome->timing.completed;
  sample.prompt_tokens = request.token_ids_size();
  sample.kv_bytes = static_cast<int64_t>(outcome->completed.kv_bytes());
  sample.density = Density(outcome->completed);
  return sample;
}

BenchCell Bench::Run(const std::string& preset, int64_t length) const {
  for (int64_t i = 0; i < options_.warmup; ++i) Send(MakeRequest(preset, length, -1 - i), 0);
  BenchCell cell{.preset = preset, .length = length, .result = {}, .summary = {}};
  cell.result = RunLoad(options_.load, [&](int64_t index, int worker) {
    return Send(MakeRequest(preset, length, index), worker);
  });
  cell.summary = Summarize(cell.result);
  return cell;
}

nlohmann::json Bench::ServerJson() const {
  return {{"model", model_.model()},
          {"model_hash", model_.model_hash()},
          {"version", server_.version()},
          {"backend", server_.backend()},
          {"device", server_.device()}};
}

std::string FormatHeader() {
  return absl::StrFormat("%-10s %8s %9s %10s %9s %9s %9s %8s %8s\n", "preset", "tokens", "requests",
                         "tokens/s", "TTFT p50", "p90", "p99", "density", "KV GB/s");
}

std::string FormatCell(const BenchCell& cell) {
  const LoadSummary& s = cell.summary;
  std::string text = absl::StrFormat(
      "%-10s %8d %9s %10.0f %8.3fs %8.3fs %8.3fs %8.3f %8.3f\n", cell.preset, cell.length,
      absl::StrCat(s.ok, "/", cell.result.samples.size()), s.tokens_per_second, s.ttft_p50,
      s.ttft_p90, s.ttft_p99, s.density, s.kv_gigabytes_per_second);
  for (const auto& [kind, errors] : s.errors) {
    absl::StrAppendFormat(&text, "  %d x %s, as: %s\n", errors.count, absl::Utf8SafeCEscape(kind),
                          errors.example);
  }
  return text;
}

nlohmann::json CellJson(const BenchCell& cell) {
  const LoadSummary& s = cell.summary;
  nlohmann::json errors = nlohmann::json::object();
  for (const auto& [kind, of_kind] : s.errors)
    errors[kind] = {{"count", of_kind.count}, {"example", of_kind.example}};
  std::vector<double> ttft;
  for (const LoadSample& sample : cell.result.samples) {
    if (sample.error.empty()) ttft.push_back(absl::ToDoubleSeconds(sample.ttft));
  }
  return {{"preset", cell.preset},
          {"prompt_tokens", cell.length},
          {"requests", cell.result.samples.size()},
          {"ok", s.ok},
          {"errors", errors},
          {"wall_seconds", absl::ToDoubleSeconds(cell.result.wall)},
          {"tokens_per_second", s.tokens_per_second},
          {"ttft_seconds",
           {{"p50", s.ttft_p50}, {"p90", s.ttft_p90}, {"p99", s.ttft_p99}, {"all", ttft}}},
          {"density", s.density},
          {"kv_gigabytes_per_second", s.kv_gigabytes_per_second}};
}

// Fails when no request of any cell went well.
absl::Status RunBench(BenchOptions options) {
  const bool endless =
      options.load.num_requests == 0 && options.load.duration == absl::InfiniteDuration();
  if (endless) options.load.num_requests = 5;
  Bench bench(options);
  if (absl::Status status = bench.Prepare(); !status.ok()) return status;
  nlohmann::json cells = nlohmann::json::array();
  int64_t ok = 0;
  if (!options.json) std::cout << FormatHeader() << std::flush;
  for (const int64_t length : options.lengths) {
    for (const std::string& preset : options.presets) {
      const BenchCell cell = bench.Run(preset, length);
      ok += cell.summary.ok;
      if (!options.json) std::cout << FormatCell(cell) << std::flush;
      cells.push_back(CellJson(cell));
    }
  }
  if (options.json) {
    const nlohmann::json load = {{"concurrency", options.load.concurrency},
                                 {"rate", options.load.rate_per_second},
                                 {"seed", options.load.seed},
                                 {"tokens_file", options.tokens_file}};
    std::cout << nlohmann::json{{"server", bench.ServerJson()}, {"load", load}, {"results", cells}}
                     .dump(2)
              << std::endl;
  }
  return ok > 0 ? absl::OkStatus() : absl::UnavailableError("no request went well");
}

void AddLoadFlags(CLI::App& command, BenchOptions* options) {
  command
      .add_option("--requests", options->load.num_requests,
                  "Requests of every length and preset; default 5 without --duration")
      ->check(CLI::Range(int64_t{1}, int64_t{1000000}));
  AddDurationFlag(command, "--duration", &options->load.duration,
                  "Time of every length and preset in which requests start");
  auto* concurrency =
      command
          .add_option("--concurrency", options->load.concurrency, "Closed loop: requests under way")
          ->check(CLI::Range(1, 1024))
          ->capture_default_str();
  command
      .add_option("--rate", options->load.rate_per_second, "Open loop: Poisson arrivals per second")
      ->check(CLI::Range(1e-6, 1e6))
      ->excludes(concurrency);
  command.add_option("--warmup", options->warmup, "Requests before every measurement")
      ->check(CLI::Range(0, 1000))
      ->capture_default_str();
  command.add_option("--seed", options->load.seed, "Of prompts and arrivals")
      ->capture_default_str();
}

}  // namespace

void AddBenchCommand(CLI::App& app, std::function<void(int)> set_exit_code) {
  auto options = std::make_shared<BenchOptions>();
  CLI::App& command =
      *app.add_subcommand("bench", "Measure a running server: tokens/s, TTFT, density, KV rate");
  AddConnectionFlags(command, &options->client);
  command.add_option("--lengths", options->lengths, "Prompt lengths in tokens, apart by commas")
      ->delimiter(',')
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 24))
      ->capture_default_str();
  command
      .add_option("--presets", options->presets,
                  "default (the server's), exact, paper, balanced, fast; apart by commas")
      ->delimiter(',')
      ->check(CLI::IsMember({"default", "exact", "paper", "balanced", "fast"}))
      ->capture_default_str();
  command.add_option("--tokens-file", options->tokens_file,
                     "Prompts are the beginning of these ids (real text); default: random ids");
  AddLoadFlags(command, options.get());
  AddAttentionFlags(command, /*with_preset=*/false, &options->request);
  command.add_flag("--json", options->json, "Print JSON instead of a table");
  command.final_callback([options, set_exit_code = std::move(set_exit_code)] {
    set_exit_code(ReportStatus("headstart bench", RunBench(*options)));
  });
}

}  // namespace headstart
