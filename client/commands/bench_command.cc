#include "client/commands/bench_command.h"

#include <algorithm>
#include <cstring>
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
#include "client/manifest_check.h"
#include "client/prefill_client.h"
#include "kernels/base/status_macros.h"

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
  bool into_memory = false;
  bool fetch_alone = false;
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
  BenchCell Run(const std::string& preset, int64_t length);
  nlohmann::json ServerJson() const;

 private:
  v1::PrefillRequest MakeRequest(const std::string& preset, int64_t length, int64_t index) const;
  LoadSample Send(const v1::PrefillRequest& request, int worker);
  // Waits until the prompt is computed, then takes its KV: the sample's time is the fetch's alone.
  absl::Status FetchAlone(v1::PrefillRequest request, int worker, LoadSample* sample);
  absl::Status PrefillAndTake(const v1::PrefillRequest& request, int worker, LoadSample* sample);
  KvReceiverOptions ReceiverOf(int worker);
  absl::Status TakeMemory(int workers);
  // Puts the KV into the worker's memory, which stays from request to request.
  absl::StatusOr<KvDestination> PlaceKv(const KvShape& shape, int worker);

  const BenchOptions& options_;
  std::vector<std::unique_ptr<PrefillClient>> clients_;
  std::vector<KvBuffer> memory_;  // by worker
  v1::GetModelInfoResponse model_;
  v1::GetServerInfoResponse server_;
  std::vector<uint32_t> text_;  // from the tokens file
};

absl::Status Bench::Prepare() {
  PrefillClientOptions client_options = options_.client;
  client_options.retry.max_attempts = 1;  // a refusal is a result
  const bool open_loop = options_.load.rate_per_second > 0;
  const int num_clients =
      open_loop ? std::min(options_.load.max_outstanding, 8) : options_.load.concurrency;
  for (int i = 0; i < num_clients; ++i) {
    HEADSTART_ASSIGN_OR_RETURN(auto client, PrefillClient::Create(client_options));
    clients_.push_back(std::move(client));
  }
  HEADSTART_ASSIGN_OR_RETURN(model_, clients_[0]->GetModelInfo());
  HEADSTART_ASSIGN_OR_RETURN(server_, clients_[0]->GetServerInfo());
  HEADSTART_RETURN_IF_ERROR(TakeMemory(open_loop ? options_.load.max_outstanding : num_clients));
  if (model_.vocab_size() == 0) return absl::DataLossError("the server's model has no vocabulary");
  if (options_.tokens_file.empty()) return absl::OkStatus();
  HEADSTART_ASSIGN_OR_RETURN(text_, ReadTokenIds(options_.tokens_file));
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

absl::StatusOr<KvDestination> Bench::PlaceKv(const KvShape& shape, int worker) {
  KvBuffer& memory = memory_[static_cast<size_t>(worker)];
  if (memory.bytes < shape.total_bytes()) {
    HEADSTART_ASSIGN_OR_RETURN(memory, AllocateKv(shape));
  }
  return ContiguousKv(shape, memory.span().first(static_cast<size_t>(shape.total_bytes())));
}

// A decode node has its memory before a prompt comes: all of it is there before anything is
// measured.
absl::Status Bench::TakeMemory(int workers) {
  const v1::KvLayout& layout = model_.kv_layout();
  const KvShape shape{
      .num_layers = layout.num_layers(),
      .num_kv_heads = layout.num_kv_heads(),
      .head_dim = layout.head_dim(),
      .num_tokens = *std::max_element(options_.lengths.begin(), options_.lengths.end()),
      .element_bytes = KvDtypeBytes(layout.dtype())};
  memory_.resize(static_cast<size_t>(workers));
  if (!options_.into_memory) return absl::OkStatus();
  for (KvBuffer& memory : memory_) {
    HEADSTART_ASSIGN_OR_RETURN(memory, AllocateKv(shape));
    std::memset(memory.data.get(), 0, static_cast<size_t>(memory.bytes));
  }
  return absl::OkStatus();
}

KvReceiverOptions Bench::ReceiverOf(int worker) {
  KvReceiverOptions receive;
  if (options_.into_memory) {
    receive.on_manifest = [this, worker](const v1::KvManifest&, const KvShape& shape) {
      return PlaceKv(shape, worker);
    };
  }
  return receive;
}

absl::Status Bench::PrefillAndTake(const v1::PrefillRequest& request, int worker,
                                   LoadSample* sample) {
  HEADSTART_ASSIGN_OR_RETURN(
      const PrefillOutcome outcome,
      clients_[worker % clients_.size()]->Prefill(request, ReceiverOf(worker)));
  sample->ttft = outcome.timing.completed;
  sample->kv_bytes = static_cast<int64_t>(outcome.completed.kv_bytes());
  sample->exposed_transfer = ExposedTransfer(outcome.completed);
  sample->connections = outcome.connections;
  sample->density = Density(outcome.completed);
  return absl::OkStatus();
}

absl::Status Bench::FetchAlone(v1::PrefillRequest request, int worker, LoadSample* sample) {
  const PrefillClient& client = *clients_[worker % clients_.size()];
  request.mutable_detached();
  KvLocation location;
  KvReceiverOptions prefill;
  prefill.on_accepted = [&location](const v1::Accepted& accepted) {
    location = {accepted.fetch_id(), accepted.fetch_address()};
    return absl::OkStatus();
  };
  HEADSTART_ASSIGN_OR_RETURN(const PrefillOutcome outcome, client.Prefill(request, prefill));
  sample->connections = std::max(options_.client.connections, 1);
  sample->density = Density(outcome.completed);
  const absl::Time start = absl::Now();
  const absl::StatusOr<FetchOutcome> fetched =
      client.Fetch(location, {}, sample->connections, ReceiverOf(worker));
  sample->ttft = absl::Now() - start;
  HEADSTART_RETURN_IF_ERROR(client.ReleaseKv(location));
  HEADSTART_RETURN_IF_ERROR(fetched.status());
  sample->kv_bytes = static_cast<int64_t>(fetched->completed.kv_bytes());
  return absl::OkStatus();
}

LoadSample Bench::Send(const v1::PrefillRequest& request, int worker) {
  LoadSample sample;
  const absl::Status status = options_.fetch_alone ? FetchAlone(request, worker, &sample)
                                                   : PrefillAndTake(request, worker, &sample);
  if (!status.ok()) {
    const std::string reason = ErrorReasonOf(status);
    sample.error =
        absl::StrCat(absl::StatusCodeToString(status.code()), reason.empty() ? "" : " ", reason);
    sample.message = DescribeStatus(status);
    return sample;
  }
  sample.prompt_tokens = request.token_ids_size();
  return sample;
}

BenchCell Bench::Run(const std::string& preset, int64_t length) {
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
          {"kv_bytes_per_token", model_.kv_bytes_per_token()},
          {"version", server_.version()},
          {"backend", server_.backend()},
          {"device", server_.device()}};
}

std::string FormatHeader() {
  return absl::StrFormat("%-10s %8s %9s %10s %9s %9s %9s %8s %8s %9s %5s\n", "preset", "tokens",
                         "requests", "tokens/s", "TTFT p50", "p90", "p99", "density", "KV GB/s",
                         "exposed", "conns");
}

std::string FormatCell(const BenchCell& cell) {
  const LoadSummary& s = cell.summary;
  std::string text =
      absl::StrFormat("%-10s %8d %9s %10.0f %8.3fs %8.3fs %8.3fs %8.3f %8.3f %8.3fs %5d\n",
                      cell.preset, cell.length, absl::StrCat(s.ok, "/", cell.result.samples.size()),
                      s.tokens_per_second, s.ttft_p50, s.ttft_p90, s.ttft_p99, s.density,
                      s.kv_gigabytes_per_second, s.exposed_transfer_p50, s.connections);
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
          {"exposed_transfer_seconds", {{"p50", s.exposed_transfer_p50}}},
          {"connections", s.connections},
          {"kv_gigabytes_per_second", s.kv_gigabytes_per_second}};
}

// Fails when no request of any cell went well.
absl::Status RunBench(BenchOptions options) {
  KeepReceiveMemory();
  const bool endless =
      options.load.num_requests == 0 && options.load.duration == absl::InfiniteDuration();
  if (endless) options.load.num_requests = 5;
  Bench bench(options);
  HEADSTART_RETURN_IF_ERROR(bench.Prepare());
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
  command.add_flag(
      "--into-memory", options->into_memory,
      "Place the KV into memory, as a decode node does; else it is checked and dropped");
  command.add_flag("--fetch-alone", options->fetch_alone,
                   "Detached KV is fetched when it is computed; TTFT is the time of the fetch");
  AddLoadFlags(command, options.get());
  AddAttentionFlags(command, /*with_preset=*/false, &options->request);
  command.add_flag("--json", options->json, "Print JSON instead of a table");
  command.final_callback([options, set_exit_code = std::move(set_exit_code)] {
    set_exit_code(ReportStatus("headstart bench", RunBench(*options)));
  });
}

}  // namespace headstart
