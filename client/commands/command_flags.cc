#include "client/commands/command_flags.h"

#include <malloc.h>

#include <cstdio>
#include <map>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "client/grpc_status.h"

namespace headstart {
namespace {

const std::map<std::string, v1::AttentionPreset>& Presets() {
  static const auto* presets =
      new std::map<std::string, v1::AttentionPreset>{{"exact", v1::ATTENTION_PRESET_EXACT},
                                                     {"paper", v1::ATTENTION_PRESET_PAPER},
                                                     {"balanced", v1::ATTENTION_PRESET_BALANCED},
                                                     {"fast", v1::ATTENTION_PRESET_FAST}};
  return *presets;
}

const std::map<std::string, v1::BudgetRule>& BudgetRules() {
  static const auto* rules =
      new std::map<std::string, v1::BudgetRule>{{"own", v1::BUDGET_RULE_OWN},
                                                {"shared", v1::BUDGET_RULE_SHARED},
                                                {"row", v1::BUDGET_RULE_ROW}};
  return *rules;
}

const std::map<std::string, v1::KvDtype>& KvDtypes() {
  static const auto* dtypes =
      new std::map<std::string, v1::KvDtype>{{"bf16", v1::KV_DTYPE_BF16},
                                             {"f16", v1::KV_DTYPE_F16},
                                             {"f32", v1::KV_DTYPE_F32},
                                             {"fp8_e4m3", v1::KV_DTYPE_FP8_E4M3}};
  return *dtypes;
}

}  // namespace

void AddConnectionFlags(CLI::App& app, PrefillClientOptions* options) {
  options->target = "127.0.0.1:8443";
  app.add_option("--target", options->target,
                 "Server, as gRPC names it: host:port, dns:///name:port, unix:PATH")
      ->envname("HEADSTART_TARGET")
      ->capture_default_str();
  app.add_flag("--tls", options->tls.enabled, "Use TLS; implied by the files below");
  const auto add_file = [&](const char* flag, std::string* path, const char* help) {
    app.add_option(flag, *path, help)
        ->check(CLI::ExistingFile)
        ->each([options](const std::string&) { options->tls.enabled = true; });
  };
  add_file("--tls-ca", &options->tls.ca_file,
           "Authorities that the server's certificate is checked against (PEM)");
  add_file("--tls-cert", &options->tls.cert_file, "Client certificate, for mTLS (PEM)");
  add_file("--tls-key", &options->tls.key_file, "Its key (PEM)");
  app.add_option("--tls-server-name", options->tls.server_name,
                 "Name expected in the server's certificate");
  AddDurationFlag(app, "--timeout", &options->timeout, "Time for one request, retries included")
      ->default_str(absl::FormatDuration(options->timeout));
  app.add_option("--connections", options->connections,
                 "Connections that the KV of a prompt comes on; 0: by its size and the cores")
      ->check(CLI::Range(0, kMaxConnections))
      ->capture_default_str();
  app.add_option("--allow-fetch-host", options->allowed_fetch_hosts,
                 "Host that the server may name to fetch KV from, besides the target's; * is any");
  app.add_flag("--wait", options->wait_for_ready,
               "Wait for the server to come up, until the timeout");
}

CLI::Option* AddDurationFlag(CLI::App& app, const std::string& flag, absl::Duration* value,
                             const std::string& help) {
  const auto parse = [flag, value](const std::string& text) {
    double seconds;
    const bool is_number = absl::SimpleAtod(text, &seconds);
    if (is_number) *value = absl::Seconds(seconds);
    if ((!is_number && !absl::ParseDuration(text, value)) || *value <= absl::ZeroDuration() ||
        *value > absl::Hours(24)) {
      throw CLI::ValidationError(flag, "must be a time up to 24h like 90s or 2m, not " + text);
    }
  };
  return app.add_option_function<std::string>(flag, parse, help)->type_name("TIME");
}

void AddAttentionFlags(CLI::App& app, bool with_preset, v1::PrefillRequest* request) {
  const std::string group = "Attention (default: the server's)";
  const auto attention = [request] { return request->mutable_attention(); };
  const auto add_name = [&](const char* flag, const auto& names, auto set, const char* help) {
    app.add_option_function<std::string>(
           flag, [=, &names](const std::string& name) { (attention()->*set)(names.at(name)); },
           help)
        ->check(CLI::IsMember(names))
        ->group(group);
  };
  const auto add_count = [&](const char* flag, auto set, const char* help) {
    app.add_option_function<uint32_t>(
           flag, [=](uint32_t count) { (attention()->*set)(count); }, help)
        ->group(group);
  };
  using Options = v1::AttentionOptions;
  if (with_preset) {
    add_name("--preset", Presets(), &Options::set_preset, "exact (dense), paper, balanced or fast");
  }
  app.add_option_function<float>(
         "--gamma", [=](float gamma) { attention()->set_gamma(gamma); },
         "Probability mass that a head's budget must reach, (0, 1]")
      ->group(group);
  add_name("--budget", BudgetRules(), &Options::set_budget, "Budget rule: own, shared or row");
  add_count("--num-proxies", &Options::set_num_proxies, "Proxies g");
  add_count("--stride", &Options::set_stride, "Tokens per sampled token: 4, 8 or 16");
  add_count("--floor-tokens", &Options::set_floor_tokens, "Least budget of a head");
  add_count("--sink-blocks", &Options::set_sink_blocks, "Blocks always kept at the start: 0 or 1");
  add_count("--local-blocks", &Options::set_local_blocks,
            "Blocks always kept before the diagonal one");
  add_count("--dense-tail-blocks", &Options::set_dense_tail_blocks,
            "Last query blocks that see everything");
  add_count("--dense-below-tokens", &Options::set_dense_below_tokens,
            "Prompts up to this length run dense");
}

void AddKvDtypeFlag(CLI::App& app, v1::PrefillRequest* request) {
  app.add_option_function<std::string>(
         "--kv-dtype",
         [request](const std::string& name) { request->set_kv_dtype(KvDtypes().at(name)); },
         "Type in which the KV is sent, default what the server computes in; fp8_e4m3 is half of "
         "bf16")
      ->check(CLI::IsMember(KvDtypes()));
}

std::string PresetName(v1::AttentionPreset preset) {
  absl::string_view name = v1::AttentionPreset_Name(preset);
  absl::ConsumePrefix(&name, "ATTENTION_PRESET_");
  return absl::AsciiStrToLower(name);
}

v1::AttentionPreset PresetNamed(const std::string& name) { return Presets().at(name); }

void KeepReceiveMemory() {
#ifdef __GLIBC__
  // NOLINTNEXTLINE(concurrency-mt-unsafe): the program has no other thread yet
  mallopt(M_TRIM_THRESHOLD, 1 << 30);
#endif
}

int ReportStatus(const std::string& program, const absl::Status& status) {
  if (status.ok()) return 0;
  std::fprintf(stderr, "%s: %s\n", program.c_str(), DescribeStatus(status).c_str());
  switch (status.code()) {
    case absl::StatusCode::kInvalidArgument:
    case absl::StatusCode::kNotFound:
    case absl::StatusCode::kFailedPrecondition:
      return 2;
    case absl::StatusCode::kUnavailable:
    case absl::StatusCode::kResourceExhausted:
      return 75;
    default:
      return 5;
  }
}

}  // namespace headstart
