// headstart-decode: a decode node as a program. Prints one generated token id a line, as soon as it
// is known.
#include <cstdio>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>

#include "CLI/CLI.hpp"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "client/commands/command_flags.h"
#include "client/commands/request_report.h"
#include "client/commands/terminal_progress.h"
#include "client/commands/token_ids.h"
#include "client/decode/decode_node.h"
#include "kernels/base/idle_threads.h"
#include "kernels/base/status_macros.h"

namespace headstart {
namespace {

struct Flags {
  DecodeNodeOptions node;
  std::string tokens_file = "-";
  std::string json_file;
  std::string report_file;
};

const std::map<std::string, ComputeDType>& DTypes() {
  static const auto* dtypes = new std::map<std::string, ComputeDType>{
      {"auto", ComputeDType::kAuto}, {"bf16", ComputeDType::kBF16}, {"f32", ComputeDType::kF32}};
  return *dtypes;
}

void AddFlags(CLI::App& app, Flags* flags) {
  AddConnectionFlags(app, &flags->node.client);
  app.add_option("--model", flags->node.model_dir,
                 "Hugging Face directory of the model that the server runs")
      ->required();
  app.add_flag_callback(
      "--follow-links", [flags] { flags->node.links = Links::kAnywhere; },
      "Follow links in that directory to files outside of it");
  app.add_option("--tokens-file", flags->tokens_file,
                 "Prompt: token ids as a JSON array or apart by white space; - is standard input")
      ->capture_default_str();
  app.add_option("--max-tokens", flags->node.max_new_tokens, "Tokens to generate at most")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 24))
      ->capture_default_str();
  app.add_flag("--ignore-eos", flags->node.ignore_eos, "Go on after an end-of-sequence token");
  app.add_option("--threads", flags->node.backend.num_threads, "CPU threads of the decode; 0: all")
      ->check(CLI::Range(0, 4096))
      ->capture_default_str();
  app.add_option_function<std::string>(
         "--dtype",
         [flags](const std::string& name) { flags->node.backend.dtype = DTypes().at(name); },
         "Type of the computation and of the KV; must be the server's, unless it sends fp8")
      ->check(CLI::IsMember(DTypes()));
  AddKvDtypeFlag(app, &flags->node.request);
  AddAttentionFlags(app, /*with_preset=*/true, &flags->node.request);
  app.add_option("--json", flags->json_file, "Write the statistics to this file");
  app.add_option("--report", flags->report_file, "Write them to this file as a table for people");
}

double TokensPerSecond(const DecodeNodeResult& result) {
  // The first token comes from the server: one step less than there are tokens.
  const double steps = static_cast<double>(result.tokens.size()) - (result.stop == "eos" ? 0 : 1);
  return result.decode_seconds > 0 && steps > 0 ? steps / result.decode_seconds : 0.0;
}

std::string FormatJson(const DecodeNodeResult& result) {
  nlohmann::json json = ReportJson(result.prefill);
  json["decode"] = {{"tokens", result.tokens},
                    {"stop", result.stop},
                    {"load_seconds", result.load_seconds},
                    {"import_seconds", result.import_seconds},
                    {"decode_seconds", result.decode_seconds},
                    {"tokens_per_second", TokensPerSecond(result)}};
  return json.dump(2) + "\n";
}

std::string FormatTable(const DecodeNodeResult& result) {
  return FormatReport(result.prefill) +
         absl::StrFormat("decoded  %d tokens, %.1f tokens/s, stopped by %s\n", result.tokens.size(),
                         TokensPerSecond(result), result.stop);
}

// No path, no file.
absl::Status WriteText(const std::string& path, const std::string& text) {
  if (path.empty()) return absl::OkStatus();
  std::ofstream file(path, std::ios::trunc);
  file << text;
  file.close();
  return file ? absl::OkStatus() : absl::InternalError(absl::StrCat("can't write ", path));
}

absl::Status Run(Flags& flags) {
  KeepReceiveMemory();
  HEADSTART_ASSIGN_OR_RETURN(const std::vector<uint32_t> ids, ReadTokenIds(flags.tokens_file));
  flags.node.request.mutable_token_ids()->Add(ids.begin(), ids.end());
  TerminalProgress progress;
  KvReceiverOptions receive;
  progress.Follow(&receive);
  const auto print = [&progress](int32_t token) {
    progress.Clear();
    std::printf("%d\n", token);
    std::fflush(stdout);
  };
  absl::StatusOr<DecodeNodeResult> result = RunDecodeNode(flags.node, print, std::move(receive));
  progress.Clear();
  if (!result.ok()) return result.status();
  absl::Status status = WriteText(flags.report_file, FormatTable(*result));
  status.Update(WriteText(flags.json_file, FormatJson(*result)));
  return status;
}

}  // namespace
}  // namespace headstart

int main(int argc, char** argv) {
  headstart::LimitIdleSpinning(argv);
  CLI::App app(
      "Receives the KV of a prompt from a Headstart server and decodes from it, greedily.");
  headstart::Flags flags;
  headstart::AddFlags(app, &flags);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : 2;
  }
  return headstart::ReportStatus("headstart-decode", headstart::Run(flags));
}
