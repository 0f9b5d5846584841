#include "client/commands/bench_command.h"

#include <algorithm>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "client/commands/bench_flags.h"
#include "client/commands/command_flags.h"
#include "client/commands/load.h"
#include "client/commands/load_plot.h"
#include "client/commands/load_progress.h"
#include "client/commands/load_report.h"
#include "client/commands/prompt_sender.h"
#include "client/commands/token_ids.h"
#include "client/commands/trace.h"
#include "client/commands/workload.h"
#include "kernels/base/instant.h"
#include "kernels/base/status_macros.h"

namespace headstart {
namespace {

class Bench {
 public:
  explicit Bench(const BenchOptions& options) : options_(options) {}

  // Connects, reads what is to be sent, and takes memory.
  absl::Status Prepare();
  // Measures cell by cell, and tells of each when it is done.
  void Run();
  nlohmann::json ResultsJson() const;
  const std::vector<BenchCell>& cells() const { return cells_; }

 private:
  absl::Status ReadTraceFile();
  absl::Status MakeWorkloads();
  absl::Status ReadText();
  // What of a cell is told beyond a line.
  bool detailed() const;
  LoadOptions LoadOf(const Workload& workload) const;
  BenchCell RunCell(const std::string& preset, const Workload& workload);
  SendRequest Ready(const std::string& preset, const Workload& workload, int64_t index, int worker,
                    LoadProgress* progress);
  v1::PrefillRequest MakeRequest(const std::string& preset, const LoadPrompt& prompt) const;
  std::string NameOf(const Workload& workload) const;
  nlohmann::json LoadJson() const;
  nlohmann::json ServerJson() const;

  const BenchOptions& options_;
  std::unique_ptr<PromptSender> sender_;
  Trace trace_;
  std::vector<uint32_t> text_;  // from the tokens file
  std::vector<Workload> workloads_;
  HeldPrefixes held_;
  std::vector<BenchCell> cells_;
};

absl::Status Bench::Prepare() {
  const LoadOptions& load = options_.load;
  const bool traced = !options_.trace_file.empty() && options_.replay_times;
  const bool open_loop = traced || load.open_loop();
  HEADSTART_ASSIGN_OR_RETURN(
      sender_,
      PromptSender::Create(options_.sender, open_loop ? load.max_outstanding : load.concurrency));
  if (!options_.trace_file.empty()) HEADSTART_RETURN_IF_ERROR(ReadTraceFile());
  HEADSTART_RETURN_IF_ERROR(MakeWorkloads());
  HEADSTART_RETURN_IF_ERROR(ReadText());
  if (workloads_.size() * options_.presets.size() > 1 && !options_.plot_file.empty())
    return absl::InvalidArgumentError("--plot shows one preset, and one length, mix or trace");
  int64_t longest = 0;
  for (const Workload& workload : workloads_) longest = std::max(longest, workload.longest());
  // How many prompts of an open loop are under way at a time is not known before: their memory
  // grows.
  return sender_->Reserve(open_loop ? 0 : load.concurrency, longest);
}

absl::Status Bench::ReadTraceFile() {
  TraceOptions options = options_.trace;
  options.max_prompts = options_.load.num_requests;
  options.max_tokens = sender_->model().max_prompt_tokens();
  if (options_.replay_times) options.duration = options_.load.duration;
  HEADSTART_ASSIGN_OR_RETURN(trace_, ReadTrace(options_.trace_file, options));
  return absl::OkStatus();
}

absl::Status Bench::MakeWorkloads() {
  Workload workload;
  HEADSTART_ASSIGN_OR_RETURN(workload.priorities, Mix::Parse(options_.priorities, -100, 100));
  HEADSTART_ASSIGN_OR_RETURN(workload.lengths, Mix::Parse(options_.lengths, 1, kMaxBenchTokens));
  workload.vocab_size = sender_->model().vocab_size();
  workload.seed = options_.load.seed;
  if (!options_.tokens_file.empty()) workload.text = &text_;
  if (!options_.trace_file.empty()) workload.trace = &trace_;
  if (workload.trace != nullptr || workload.lengths.weighted()) {
    workloads_.push_back(workload);
    return absl::OkStatus();
  }
  for (const Mix::Part& part : workload.lengths.parts()) {
    workloads_.push_back(workload);
    workloads_.back().lengths = Mix::Of(part.value);
  }
  return absl::OkStatus();
}

absl::Status Bench::ReadText() {
  if (options_.tokens_file.empty()) return absl::OkStatus();
  HEADSTART_ASSIGN_OR_RETURN(text_, ReadTokenIds(options_.tokens_file));
  for (const Workload& workload : workloads_) {
    if (workload.longest() <= static_cast<int64_t>(text_.size())) continue;
    return absl::InvalidArgumentError(absl::StrCat(options_.tokens_file, " has ", text_.size(),
                                                   " tokens, --lengths wants ",
                                                   workload.longest()));
  }
  return absl::OkStatus();
}

bool Bench::detailed() const {
  return workloads_[0].trace != nullptr || workloads_[0].lengths.weighted() ||
         options_.load.open_loop() || options_.slo_ttft != absl::InfiniteDuration();
}

LoadOptions Bench::LoadOf(const Workload& workload) const {
  LoadOptions load = options_.load;
  if (workload.trace != nullptr) {
    load.num_requests = static_cast<int64_t>(workload.trace->prompts.size());
    if (options_.replay_times)
      for (const TracePrompt& prompt : workload.trace->prompts) load.arrivals.push_back(prompt.due);
  } else if (load.num_requests == 0 && load.duration == absl::InfiniteDuration()) {
    load.num_requests = 5;
  }
  return load;
}

v1::PrefillRequest Bench::MakeRequest(const std::string& preset, const LoadPrompt& prompt) const {
  v1::PrefillRequest request = options_.request;
  // Single values mean nothing to dense attention.
  if (preset == "exact") request.clear_attention();
  if (preset != "default") request.mutable_attention()->set_preset(PresetNamed(preset));
  request.set_prefix_reuse(options_.prefix_reuse.value_or(
      text_.empty() ? v1::PREFIX_REUSE_SAME_ATTENTION : v1::PREFIX_REUSE_NONE));
  request.set_priority(prompt.priority);
  request.mutable_token_ids()->Add(prompt.token_ids.begin(), prompt.token_ids.end());
  return request;
}

SendRequest Bench::Ready(const std::string& preset, const Workload& workload, int64_t index,
                         int worker, LoadProgress* progress) {
  LoadPrompt prompt = PromptOf(workload, index);
  v1::PrefillRequest request = MakeRequest(preset, prompt);
  return [this, worker, progress, request = std::move(request),
          names = std::move(prompt.prefix_names)](LoadSample* sample) mutable {
    if (options_.client_keeps_kv) {
      const int64_t held = held_.CountHeld(names) * trace_.block_tokens;
      request.set_skip_tokens(
          static_cast<uint32_t>(std::min<int64_t>(held, request.token_ids_size() - 1)));
    }
    progress->Sent();
    sender_->Send(request, worker, sample);
    if (sample->ok()) held_.Add(names);
    progress->Ended(*sample);
  };
}

BenchCell Bench::RunCell(const std::string& preset, const Workload& workload) {
  for (int64_t i = 0; i < options_.warmup; ++i) {
    LoadSample sample;
    sample.planned = Instant::Now();
    sender_->Send(MakeRequest(preset, PromptOf(workload, -1 - i)), 0, &sample);
  }
  BenchCell cell{.preset = preset,
                 .tokens = NameOf(workload),
                 .slo_ttft = options_.slo_ttft,
                 .result = {},
                 .summary = {}};
  LoadProgress progress;
  cell.result = RunLoad(LoadOf(workload), [&](int64_t index, int worker) {
    return Ready(preset, workload, index, worker, &progress);
  });
  progress.Clear();
  cell.summary = Summarize(cell.result, options_.slo_ttft);
  return cell;
}

std::string Bench::NameOf(const Workload& workload) const {
  if (workload.trace != nullptr) return "trace";
  return workload.lengths.weighted() ? "mix" : absl::StrCat(workload.longest());
}

void Bench::Run() {
  if (!options_.json && !detailed()) std::cout << FormatCellHeader() << std::flush;
  if (!options_.json && trace_.num_cut + trace_.num_skipped > 0) {
    std::cout << "longer than " << sender_->model().max_prompt_tokens()
              << " tokens: " << trace_.num_cut << " cut, " << trace_.num_skipped << " left out\n";
  }
  for (const Workload& workload : workloads_) {
    for (const std::string& preset : options_.presets) {
      cells_.push_back(RunCell(preset, workload));
      if (options_.json) continue;
      std::cout << (detailed() ? FormatCellDetails(cells_.back()) : FormatCellLine(cells_.back()))
                << std::flush;
    }
  }
}

nlohmann::json Bench::ServerJson() const {
  const v1::GetModelInfoResponse& model = sender_->model();
  const v1::GetServerInfoResponse& server = sender_->server();
  return {{"model", model.model()},
          {"model_hash", model.model_hash()},
          {"kv_bytes_per_token", model.kv_bytes_per_token()},
          {"max_prompt_tokens", model.max_prompt_tokens()},
          {"version", server.version()},
          {"backend", server.backend()},
          {"device", server.device()}};
}

nlohmann::json Bench::LoadJson() const {
  nlohmann::json load = {{"concurrency", options_.load.concurrency},
                         {"rate", options_.load.rate_per_second},
                         {"seed", options_.load.seed},
                         {"lengths", options_.lengths},
                         {"priorities", options_.priorities},
                         {"deadline_seconds", absl::ToDoubleSeconds(options_.sender.deadline)},
                         {"tokens_file", options_.tokens_file}};
  if (options_.trace_file.empty()) return load;
  load["trace"] = {{"file", options_.trace_file},   {"prompts", trace_.prompts.size()},
                   {"speed", options_.trace.speed}, {"block_tokens", trace_.block_tokens},
                   {"cut", trace_.num_cut},         {"skipped", trace_.num_skipped}};
  return load;
}

nlohmann::json Bench::ResultsJson() const {
  nlohmann::json results = nlohmann::json::array();
  for (const BenchCell& cell : cells_) results.push_back(CellJson(cell));
  return {{"server", ServerJson()}, {"load", LoadJson()}, {"results", results}};
}

// Fails when no request of any cell went well.
absl::Status RunBench(const BenchOptions& options) {
  KeepReceiveMemory();
  Bench bench(options);
  HEADSTART_RETURN_IF_ERROR(bench.Prepare());
  bench.Run();
  if (options.json) std::cout << bench.ResultsJson().dump(2) << std::endl;
  if (!options.records_file.empty())
    HEADSTART_RETURN_IF_ERROR(WriteRecords(options.records_file, bench.cells()));
  if (!options.plot_file.empty())
    HEADSTART_RETURN_IF_ERROR(WritePlot(options.plot_file, bench.cells().front()));
  const bool some_ok = std::any_of(bench.cells().begin(), bench.cells().end(),
                                   [](const BenchCell& cell) { return cell.summary.all.ok > 0; });
  return some_ok ? absl::OkStatus() : absl::UnavailableError("no request went well");
}

}  // namespace

void AddBenchCommand(CLI::App& app, std::function<void(int)> set_exit_code) {
  auto options = std::make_shared<BenchOptions>();
  CLI::App& command = *app.add_subcommand(
      "bench", "Load a running server: tokens/s, TTFT, KV rate, prefix hits, refusals");
  AddBenchFlags(command, options.get());
  command.final_callback([options, set_exit_code = std::move(set_exit_code)] {
    set_exit_code(ReportStatus("headstart bench", RunBench(*options)));
  });
}

}  // namespace headstart
