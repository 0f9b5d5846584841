#include "client/commands/bench_flags.h"

#include <map>

#include "client/commands/command_flags.h"

namespace headstart {
namespace {

void AddPromptFlags(CLI::App& command, BenchOptions* options) {
  const std::string group = "Prompts";
  CLI::Option* lengths =
      command
          .add_option("--lengths", options->lengths,
                      "Prompt lengths in tokens, apart by commas, measured one after the other; "
                      "with weights, as 512:4,8192:1, drawn from in one measurement")
          ->delimiter(',')
          ->capture_default_str()
          ->group(group);
  command
      .add_option("--presets", options->presets,
                  "default (the server's), exact, paper, balanced, fast; apart by commas")
      ->delimiter(',')
      ->check(CLI::IsMember({"default", "exact", "paper", "balanced", "fast"}))
      ->capture_default_str()
      ->group(group);
  command
      .add_option("--priority,--priorities", options->priorities,
                  "Of the requests, [-100, 100]; a mix with weights, as 0:9,10:1")
      ->delimiter(',')
      ->capture_default_str()
      ->group(group);
  CLI::Option* text =
      command
          .add_option("--tokens-file", options->tokens_file,
                      "Prompts are the beginning of these ids (real text), and share no prefix "
                      "cache; default: random ids")
          ->group(group);
  command
      .add_option("--trace", options->trace_file,
                  "Replay a trace: JSON lines with timestamp (ms), input_length, hash_ids "
                  "(Mooncake's format); with --concurrency as a closed loop")
      ->check(CLI::ExistingFile)
      ->excludes(lengths)
      ->excludes(text)
      ->group(group);
}

void AddTraceFlags(CLI::App& command, BenchOptions* options) {
  const std::string group = "Of a trace";
  CLI::Option* trace = command.get_option("--trace");
  command.add_option("--speed", options->trace.speed, "So many times faster than it was")
      ->check(CLI::Range(1e-6, 1e6))
      ->needs(trace)
      ->capture_default_str()
      ->group(group);
  command
      .add_option("--trace-block", options->trace.block_tokens, "Tokens that a hash id stands for")
      ->check(CLI::Range(int64_t{1}, kMaxBenchTokens))
      ->needs(trace)
      ->capture_default_str()
      ->group(group);
  command
      .add_flag("--skip-long", options->trace.skip_long,
                "Leave out prompts that the server's limit forbids; else they are cut to it")
      ->needs(trace)
      ->group(group);
  command
      .add_flag("--decode-holds-prefix", options->client_keeps_kv,
                "The client keeps the KV of prompts that went well: blocks at the start of later "
                "ones are not shipped again (skip_tokens)")
      ->needs(trace)
      ->group(group);
}

void AddLoadFlags(CLI::App& command, BenchOptions* options) {
  const std::string group = "Load";
  LoadOptions& load = options->load;
  command
      .add_option("--requests,--max-prompts", load.num_requests,
                  "Requests of every measurement; default 5 without --duration, all of a trace")
      ->check(CLI::Range(int64_t{1}, int64_t{1000000}))
      ->group(group);
  AddDurationFlag(command, "--duration", &load.duration,
                  "Time of every measurement in which requests start")
      ->group(group);
  auto* concurrency = command
                          .add_option_function<int>(
                              "--concurrency",
                              [options](int concurrency) {
                                options->load.concurrency = concurrency;
                                options->replay_times = false;
                              },
                              "Closed loop: requests under way; default 1")
                          ->check(CLI::Range(1, 1024))
                          ->group(group);
  command.add_option("--rate", load.rate_per_second, "Open loop: Poisson arrivals per second")
      ->check(CLI::Range(1e-6, 1e6))
      ->excludes(concurrency)
      ->excludes("--trace")
      ->group(group);
  command
      .add_option("--max-outstanding", load.max_outstanding,
                  "Open loop: requests under way; later ones wait here, which counts as theirs")
      ->check(CLI::Range(1, kMostPromptsAtATime))
      ->capture_default_str()
      ->group(group);
  AddDurationFlag(command, "--deadline", &options->sender.deadline,
                  "Of every request, from when it was planned; default: --timeout from when it is "
                  "sent")
      ->group(group);
  command.add_option("--warmup", options->warmup, "Requests before every measurement")
      ->check(CLI::Range(0, 1000))
      ->capture_default_str()
      ->group(group);
  command.add_option("--seed", load.seed, "Of prompts and arrivals")
      ->capture_default_str()
      ->group(group);
}

void AddPrefixFlag(CLI::App& command, BenchOptions* options) {
  static const auto* names =
      new std::map<std::string, v1::PrefixReuse>{{"same", v1::PREFIX_REUSE_SAME_ATTENTION},
                                                 {"dense", v1::PREFIX_REUSE_DENSE},
                                                 {"none", v1::PREFIX_REUSE_NONE}};
  command
      .add_option_function<std::string>(
          "--prefix-reuse",
          [options](const std::string& name) { options->prefix_reuse = names->at(name); },
          "Pages of the server's prefix cache: of the same attention, dense ones, or none; default "
          "same, with --tokens-file none")
      ->check(CLI::IsMember(*names));
}

void AddResultFlags(CLI::App& command, BenchOptions* options) {
  const std::string group = "Results";
  AddDurationFlag(command, "--slo-ttft", &options->slo_ttft,
                  "Objective: show the share of prompts whose TTFT is within")
      ->group(group);
  command.add_flag("--json", options->json, "Print JSON instead of a table")->group(group);
  command
      .add_option("--records", options->records_file,
                  "Write every prompt's times and outcome: CSV where the name ends with .csv, else "
                  "JSON lines")
      ->group(group);
  command.add_option("--plot", options->plot_file, "Write a picture of the load (SVG)")
      ->group(group);
}

}  // namespace

void AddBenchFlags(CLI::App& command, BenchOptions* options) {
  AddConnectionFlags(command, &options->sender.client);
  AddPromptFlags(command, options);
  AddTraceFlags(command, options);
  AddLoadFlags(command, options);
  AddPrefixFlag(command, options);
  command.add_flag(
      "--into-memory", options->sender.into_memory,
      "Place the KV into memory, as a decode node does; else it is checked and dropped");
  command.add_flag("--fetch-alone", options->sender.fetch_alone,
                   "Detached KV is fetched when it is computed; TTFT is the time of the fetch");
  AddKvDtypeFlag(command, &options->request);
  AddAttentionFlags(command, /*with_preset=*/false, &options->request);
  AddResultFlags(command, options);
}

}  // namespace headstart
