#include "client/commands/request_command.h"

#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "client/commands/command_flags.h"
#include "client/commands/request_report.h"
#include "client/commands/terminal_progress.h"
#include "client/commands/token_ids.h"
#include "client/page_names.h"
#include "client/prefill_client.h"
#include "google/protobuf/util/json_util.h"
#include "kernels/base/status_macros.h"

namespace headstart {
namespace {

struct RequestOptions {
  PrefillClientOptions client;
  v1::PrefillRequest request;  // with the attention asked for
  std::string tokens_file;
  std::string random;
  std::string model;
  std::string request_id;
  uint32_t skip_tokens = 0;
  int32_t priority = 0;
  std::string cache_salt;
  v1::PrefixReuse prefix_reuse = v1::PREFIX_REUSE_SAME_ATTENTION;
  std::vector<std::string> held_pages;  // files
  float temperature = 0.0f;
  uint32_t top_k = 0;
  float top_p = 0.0f;
  uint64_t seed = 0;
  std::string save_dir;
  bool estimate = false;
  bool json = false;
};

absl::StatusOr<std::vector<uint32_t>> PromptOf(const RequestOptions& options,
                                               const PrefillClient& client) {
  if (options.random.empty()) return ReadTokenIds(options.tokens_file);
  HEADSTART_ASSIGN_OR_RETURN(const RandomPrompt prompt, ParseRandomPrompt(options.random));
  HEADSTART_ASSIGN_OR_RETURN(const v1::GetModelInfoResponse info,
                             client.GetModelInfo(options.model));
  if (info.vocab_size() == 0) return absl::DataLossError("the server's model has no vocabulary");
  return RandomTokenIds(prompt.count, info.vocab_size(), prompt.seed);
}

// Of all files, one behind the other.
absl::StatusOr<std::string> ReadHeldPages(const std::vector<std::string>& paths) {
  std::string names;
  for (const std::string& path : paths) {
    std::ifstream file(path, std::ios::binary);
    if (!file) return absl::InvalidArgumentError("can't read " + path);
    const std::string bytes{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
    if (bytes.size() % kPageNameBytes != 0) {
      return absl::InvalidArgumentError(
          absl::StrCat(path, " has ", bytes.size(), " bytes, not a multiple of ", kPageNameBytes));
    }
    names += bytes;
  }
  return names;
}

absl::StatusOr<v1::PrefillRequest> MakeRequest(const RequestOptions& options,
                                               const std::vector<uint32_t>& ids) {
  v1::PrefillRequest request = options.request;
  HEADSTART_ASSIGN_OR_RETURN(*request.mutable_held_pages(), ReadHeldPages(options.held_pages));
  request.set_priority(options.priority);
  request.set_cache_salt(options.cache_salt);
  request.set_prefix_reuse(options.prefix_reuse);
  request.set_model(options.model);
  request.set_request_id(options.request_id);
  request.set_skip_tokens(options.skip_tokens);
  request.mutable_token_ids()->Add(ids.begin(), ids.end());
  v1::SamplingOptions& sampling = *request.mutable_sampling();
  sampling.set_temperature(options.temperature);
  sampling.set_top_k(options.top_k);
  sampling.set_top_p(options.top_p);
  sampling.set_seed(options.seed);
  return request;
}

absl::Status WriteFile(const std::filesystem::path& path, const char* data, size_t bytes) {
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file.write(data, static_cast<std::streamsize>(bytes));
  file.close();
  return file ? absl::OkStatus() : absl::InternalError(absl::StrCat("can't write ", path.string()));
}

// KV as it is sent.
struct SentKv {
  KvBuffer kv;
  std::vector<float> scales;
};

// manifest.json, pages.bin: names of the prompt's pages, and kv.bin:
// [layer][K, V][kv_heads][tokens][head_dim]; of fp8 also scales.bin: float32
// [layer][page][K, V][kv_heads].
absl::Status Save(const std::string& dir, const v1::KvManifest& manifest, const SentKv& sent) {
  std::error_code error;
  std::filesystem::create_directories(dir, error);
  if (error) return absl::InternalError(absl::StrCat("can't make ", dir, ": ", error.message()));
  std::string json;
  google::protobuf::util::JsonPrintOptions style;
  style.add_whitespace = true;
  style.preserve_proto_field_names = true;
  if (!google::protobuf::util::MessageToJsonString(manifest, &json, style).ok()) {
    return absl::InternalError("the manifest has no JSON form");
  }
  const std::filesystem::path folder(dir);
  HEADSTART_RETURN_IF_ERROR(WriteFile(folder / "manifest.json", json.data(), json.size()));
  const std::string& names = manifest.page_hashes();
  HEADSTART_RETURN_IF_ERROR(WriteFile(folder / "pages.bin", names.data(), names.size()));
  if (!sent.scales.empty()) {
    HEADSTART_RETURN_IF_ERROR(WriteFile(folder / "scales.bin",
                                        reinterpret_cast<const char*>(sent.scales.data()),
                                        sent.scales.size() * sizeof(float)));
  }
  const KvBuffer& kv = sent.kv;
  return WriteFile(folder / "kv.bin", reinterpret_cast<const char*>(kv.data.get()), kv.bytes);
}

// Makes room for the KV when its size is known.
auto ReceiveInto(SentKv* sent) {
  return [sent](const v1::KvManifest&, const KvShape& shape) -> absl::StatusOr<KvDestination> {
    HEADSTART_ASSIGN_OR_RETURN(sent->kv, AllocateKv(shape));
    HEADSTART_ASSIGN_OR_RETURN(KvDestination to, ContiguousKv(shape, sent->kv.span()));
    sent->scales.resize(static_cast<size_t>(shape.num_scales()));
    to.scales = absl::MakeSpan(sent->scales);
    return to;
  };
}

absl::Status PrintEstimate(const RequestOptions& options, const PrefillClient& client,
                           v1::PrefillRequest prefill) {
  v1::EstimateRequest request;
  *request.mutable_request() = std::move(prefill);
  HEADSTART_ASSIGN_OR_RETURN(const v1::EstimateResponse estimate, client.Estimate(request));
  std::cout << (options.json ? EstimateJson(estimate).dump(2) + "\n" : FormatEstimate(estimate))
            << std::flush;
  return absl::OkStatus();
}

absl::Status RunRequest(const RequestOptions& options) {
  KeepReceiveMemory();
  HEADSTART_ASSIGN_OR_RETURN(const auto client, PrefillClient::Create(options.client));
  HEADSTART_ASSIGN_OR_RETURN(const std::vector<uint32_t> ids, PromptOf(options, *client));
  HEADSTART_ASSIGN_OR_RETURN(v1::PrefillRequest request, MakeRequest(options, ids));
  if (options.estimate) return PrintEstimate(options, *client, std::move(request));
  TerminalProgress progress;
  KvReceiverOptions receive;
  progress.Follow(&receive);
  SentKv kv;
  if (!options.save_dir.empty()) receive.on_manifest = ReceiveInto(&kv);
  absl::StatusOr<PrefillOutcome> outcome = client->Prefill(request, std::move(receive));
  progress.Clear();
  if (!outcome.ok()) return outcome.status();
  std::cout << (options.json ? ReportJson(*outcome).dump(2) + "\n" : FormatReport(*outcome))
            << std::flush;
  return options.save_dir.empty() ? absl::OkStatus()
                                  : Save(options.save_dir, outcome->completed.manifest(), kv);
}

void AddPrefixFlags(CLI::App& command, RequestOptions* options) {
  static const auto& reuses =
      *new std::map<std::string, v1::PrefixReuse>{{"same", v1::PREFIX_REUSE_SAME_ATTENTION},
                                                  {"dense", v1::PREFIX_REUSE_DENSE},
                                                  {"none", v1::PREFIX_REUSE_NONE}};
  const std::string group = "Prefix cache";
  command
      .add_option_function<std::string>(
          "--prefix-reuse",
          [options](const std::string& name) { options->prefix_reuse = reuses.at(name); },
          "Cached pages that may stand for the start of the prompt: same (of the same attention), "
          "dense, or none")
      ->check(CLI::IsMember(reuses))
      ->default_str("same")
      ->group(group);
  command
      .add_option("--cache-salt", options->cache_salt,
                  "Share pages only among requests with the same salt; at most 64 bytes")
      ->group(group);
  command
      .add_option("--held-pages", options->held_pages,
                  "File with names of pages that are held already, 16 bytes each, as --save writes "
                  "them to pages.bin: their KV is not sent; several files: all of them")
      ->check(CLI::ExistingFile)
      ->group(group);
}

}  // namespace

void AddRequestCommand(CLI::App& app, std::function<void(int)> set_exit_code) {
  auto options = std::make_shared<RequestOptions>();
  CLI::App& command = *app.add_subcommand(
      "request", "Send one prompt, check the KV that comes back, show where the time went");
  AddConnectionFlags(command, &options->client);
  CLI::Option_group& prompt = *command.add_option_group("Prompt", "Token ids: one of these");
  prompt.add_option("--tokens-file", options->tokens_file,
                    "JSON array or ids apart by white space; - is standard input");
  prompt.add_option("--random", options->random, "N:SEED: N ids drawn from the vocabulary");
  prompt.require_option(1);
  command.add_option("--model", options->model, "Name of the model; empty: the one that is served");
  command.add_option("--request-id", options->request_id,
                     "Name of the request in logs; empty: the server chooses");
  command
      .add_option("--skip-tokens", options->skip_tokens,
                  "Leave out the KV of so many first tokens; less than the prompt has")
      ->capture_default_str();
  AddKvDtypeFlag(command, &options->request);
  AddAttentionFlags(command, /*with_preset=*/true, &options->request);
  AddPrefixFlags(command, options.get());
  command.add_option("--priority", options->priority, "Requests of higher priority run first")
      ->check(CLI::Range(-100, 100))
      ->capture_default_str();
  command.add_option("--temperature", options->temperature, "Of the first token; 0 is greedy")
      ->capture_default_str();
  command.add_option("--top-k", options->top_k, "0: all")->capture_default_str();
  command.add_option("--top-p", options->top_p, "0: all")->capture_default_str();
  command.add_option("--seed", options->seed, "Of the first token's draw")->capture_default_str();
  CLI::Option* save = command.add_option(
      "--save", options->save_dir,
      "Write DIR/manifest.json, DIR/pages.bin with the names of the prompt's pages, and "
      "DIR/kv.bin, [layer][K, V][kv_heads][tokens][head_dim] of the tokens that are not skipped; "
      "of fp8 also DIR/scales.bin, float32 [layer][page of 128 tokens][K, V][kv_heads]");
  command
      .add_flag("--estimate", options->estimate,
                "Run nothing: print what would become of the request within --timeout")
      ->excludes(save);
  command.add_flag("--json", options->json, "Print JSON instead of a table");
  command.final_callback([options, set_exit_code = std::move(set_exit_code)] {
    set_exit_code(ReportStatus("headstart request", RunRequest(*options)));
  });
}

}  // namespace headstart
