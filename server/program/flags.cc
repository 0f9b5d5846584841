#include "server/program/flags.h"

#include <openssl/sha.h>

#include <array>
#include <map>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "kernels/base/status_macros.h"

namespace headstart {
namespace {

// Ten years.
constexpr absl::Duration kMaxDuration = absl::Hours(10 * 365 * 24);
constexpr char kListeners[] = "Listeners";

// Adds options to one app under a group of its help, each with its environment variable.
class OptionGroup {
 public:
  OptionGroup(CLI::App* app, std::string name) : app_(app), name_(std::move(name)) {}

  template <typename T>
  CLI::Option* Add(const std::string& flag, T* value, const std::string& help) {
    return Finish(flag, app_->add_option("--" + flag, *value, help)->capture_default_str());
  }

  // Without a value of its own.
  template <typename T>
  void AddOptional(const std::string& flag, std::optional<T>* value, const std::string& help) {
    Finish(flag, app_->add_option("--" + flag, *value, help));
  }

  // Separated by commas, empty if not given.
  template <typename T>
  void AddList(const std::string& flag, std::vector<T>* values, const std::string& help) {
    Finish(flag, app_->add_option("--" + flag, *values, help)->delimiter(','));
  }

  template <typename T>
  void AddPositive(const std::string& flag, T* value, const std::string& help) {
    Add(flag, value, help)->check(CLI::PositiveNumber);
  }

  template <typename T>
  void AddChoice(const std::string& flag, T* value, const std::map<std::string, T>& choices,
                 const std::string& help) {
    Finish(flag,
           app_->add_option_function<std::string>(
                   "--" + flag, [value, choices](const std::string& s) { *value = choices.at(s); },
                   help + ": " + Names(choices))
               ->check(CLI::IsMember(Keys(choices)))
               ->type_name("NAME")
               ->default_str(NameOf(choices, *value)));
  }

  template <typename T>
  void AddOptionalChoice(const std::string& flag, std::optional<T>* value,
                         const std::map<std::string, T>& choices, const std::string& help) {
    Finish(flag,
           app_->add_option_function<std::string>(
                   "--" + flag, [value, choices](const std::string& s) { *value = choices.at(s); },
                   help + ": " + Names(choices))
               ->check(CLI::IsMember(Keys(choices)))
               ->type_name("NAME"));
  }

  // Like 90s, 1500ms or 2m; more than nothing, and no more than anybody means.
  void AddDuration(const std::string& flag, absl::Duration* value, const std::string& help) {
    const auto parse = [flag, value](const std::string& text) {
      if (!absl::ParseDuration(text, value) || *value <= absl::ZeroDuration() ||
          *value > kMaxDuration) {
        throw CLI::ValidationError("--" + flag, "must be a time like 90s or 2m, up to " +
                                                    absl::FormatDuration(kMaxDuration) + ", not " +
                                                    text);
      }
    };
    Finish(flag, app_->add_option_function<std::string>("--" + flag, parse, help)
                     ->type_name("TIME")
                     ->default_str(absl::FormatDuration(*value)));
  }

  // Like 65536 or 16MB (2^20 bytes each).
  template <typename T>
  void AddBytes(const std::string& flag, T* value, const std::string& help,
                const CLI::Validator& check = CLI::PositiveNumber) {
    Finish(flag, app_->add_option("--" + flag, *value, help)
                     ->transform(CLI::AsSizeValue(/*kb_is_1000=*/false))
                     ->check(check)
                     ->type_name("BYTES")
                     ->capture_default_str());
  }

 private:
  CLI::Option* Finish(const std::string& flag, CLI::Option* option) {
    return option->group(name_)->envname(EnvironmentName(flag));
  }

  template <typename T>
  static std::vector<std::string> Keys(const std::map<std::string, T>& choices) {
    std::vector<std::string> keys;
    for (const auto& [name, value] : choices) keys.push_back(name);
    return keys;
  }
  template <typename T>
  static std::string Names(const std::map<std::string, T>& choices) {
    return CLI::detail::join(Keys(choices), ", ");
  }
  template <typename T>
  static std::string NameOf(const std::map<std::string, T>& choices, T value) {
    for (const auto& [name, choice] : choices) {
      if (choice == value) return name;
    }
    return "";
  }

  CLI::App* app_;
  std::string name_;
};

void AddAttentionOptions(CLI::App* app, AttentionDefaults* a) {
  OptionGroup group(app, "Attention when a request does not say");
  AttentionRequest* r = &a->request;
  group.AddOptionalChoice<AttentionPreset>("attention", &r->preset,
                                           {{"exact", AttentionPreset::kExact},
                                            {"paper", AttentionPreset::kPaper},
                                            {"balanced", AttentionPreset::kBalanced},
                                            {"fast", AttentionPreset::kFast}},
                                           "Preset, balanced if not given");
  group.AddOptional("num-proxies", &r->num_proxies, "Representative heads");
  group.AddOptional("stride", &r->stride, "Every how many tokens scores are sampled: 4, 8 or 16");
  group.AddOptionalChoice<BudgetRule>(
      "budget", &r->budget,
      {{"own", BudgetRule::kOwn}, {"shared", BudgetRule::kShared}, {"row", BudgetRule::kRow}},
      "Budget rule");
  group.AddOptional("gamma", &r->gamma,
                    "Probability mass that a head's budget must reach, in (0, 1]");
  group.AddOptional("floor-tokens", &r->floor_tokens, "Least budget of a head, in tokens");
  group.AddOptional("sink-blocks", &r->sink_blocks,
                    "Blocks kept from the start of the prompt: 0 or 1");
  group.AddOptional("local-blocks", &r->local_blocks, "Blocks kept right before the diagonal one");
  group.AddOptional("dense-tail-blocks", &r->dense_tail_blocks,
                    "Last query blocks of the prompt that attend to everything");
  group.AddOptional("dense-below-tokens", &r->dense_below_tokens,
                    "Prompts up to this long run dense");
  group.AddOptional(
      "dense-above-density", &a->dense_above_density,
      "Selections that keep more than this share run dense; not to be changed by requests");
  group.AddList("dense-layers", &a->dense_layers,
                "Layers that always run dense; not to be changed by requests");
}

void AddListenerOptions(CLI::App* app, ServerOptions* o) {
  OptionGroup group(app, kListeners);
  group.Add("listen", &o->listen,
            "Address of the gRPC service, host:port; port 0 takes a free one");
  group.Add("admin-listen", &o->admin_listen,
            "Address of the status page, /metrics, /healthz, /readyz and /version; empty: none");
  group.Add("admin-socket", &o->admin_socket,
            "Unix socket for the same and POST /drain, open to processes of this user only; empty: "
            "none");
  group.Add("port-file", &o->port_file, "File that gets the chosen ports, as JSON");
  group.Add("fetch-address", &o->fetch_address,
            "host:port under which clients reach FetchKv of this server; empty: where they called");
  group.AddChoice<Reflection>(
      "reflection", &o->reflection,
      {{"auto", Reflection::kAuto}, {"on", Reflection::kOn}, {"off", Reflection::kOff}},
      "gRPC reflection (auto: when the service listens on loopback)");
  group.Add("tls-cert", &o->tls.cert_file, "Certificate chain, PEM; empty: plain text");
  group.Add("tls-key", &o->tls.key_file, "Private key of the certificate, PEM");
  group.Add("tls-client-ca", &o->tls.client_ca_file,
            "Clients must show a certificate that this CA signed, PEM");
  group.AddList("tls-allowed-san", &o->tls.allowed_sans,
                "Subject alternative names of clients that may call the service; empty: all");
  group.AddPositive("tls-reload-seconds", &o->tls.reload_seconds,
                    "How often certificate files are looked at for changes");
}

void AddConnectionOptions(CLI::App* app, ConnectionOptions* c) {
  OptionGroup group(app, "Connections");
  group.AddPositive("max-connections", &c->max_connections, "Connections at once; more are closed");
  group.AddPositive("max-connections-per-peer", &c->max_connections_per_peer,
                    "Connections at once from one address");
  group.AddPositive("max-streams", &c->max_streams_per_connection, "Calls at once on a connection");
  group.AddBytes("max-message-bytes", &c->max_message_bytes, "Largest request");
  group.AddBytes("max-metadata-bytes", &c->max_metadata_bytes, "Largest request metadata");
  group.AddBytes("receive-memory-bytes", &c->receive_memory_bytes,
                 "Memory of all requests that are being received");
  group.AddDuration("handshake-timeout", &c->handshake_timeout,
                    "Time to finish the TLS and HTTP/2 handshake");
  group.AddDuration("keepalive-time", &c->keepalive_time, "Quiet time before the server pings");
  group.AddDuration("keepalive-timeout", &c->keepalive_timeout,
                    "Time to answer a ping before the connection is closed");
  group.AddDuration("min-ping-interval", &c->min_ping_interval,
                    "Clients that ping more often are closed");
  group.AddDuration("max-connection-idle", &c->max_idle, "Connections without calls are closed");
  group.AddDuration("max-connection-age", &c->max_age,
                    "Connections are ended gracefully after this, so that clients spread again");
}

void AddRequestOptions(CLI::App* app, ServerOptions* o) {
  OptionGroup group(app, "Requests");
  group.AddPositive("max-queue-requests", &o->max_queue_requests,
                    "Requests accepted and not ended, at once");
  group.AddPositive("max-queue-tokens", &o->max_queue_tokens,
                    "Prompt tokens of these; a longer prompt is taken when it is alone");
  group.AddDuration("priority-ageing", &o->priority_ageing,
                    "Waiting that counts as much as one step of priority");
  group.AddDuration("default-deadline", &o->default_deadline, "For requests that bring none");
  group.AddDuration("max-deadline", &o->max_deadline, "Longer ones are cut to this");
  group.AddDuration("first-message-timeout", &o->first_message_timeout,
                    "Time from opening a call to its request message");
  group.AddDuration("write-stall-timeout", &o->write_stall_timeout,
                    "A client that takes no KV for this long is cut");
  group.AddBytes("min-kv-rate", &o->min_kv_rate,
                 "A client that takes less KV a second, over --write-stall-timeout in which there "
                 "was some to take, is cut; 0: none is",
                 CLI::NonNegativeNumber);
  group.AddDuration("default-lease", &o->default_lease,
                    "How long detached KV is kept while nobody asks for it, for requests that do "
                    "not say");
  group.AddDuration("max-lease", &o->max_lease, "Longer ones are cut to this");
}

void AddOperationOptions(CLI::App* app, ServerOptions* o) {
  OptionGroup group(app, "Operations");
  group.AddDuration("drain-timeout", &o->drain_timeout,
                    "Time for accepted requests to finish after SIGTERM");
  group.AddDuration("stuck-after", &o->stuck_after,
                    "Not healthy when no layer finishes for this long with work at hand");
  group.AddDuration("objective-base", &o->objective.base,
                    "Time to first token that is promised, whatever the length");
  group.AddDuration("objective-per-1k-tokens", &o->objective.per_1k_tokens,
                    "The same for each 1024 tokens of the prompt, in addition");
  group.Add(
      "otlp-endpoint", &o->otlp_endpoint,
      "Collector that gets traces, OTLP over gRPC: host:port, or https://host:port for TLS with "
      "the system's roots; empty: none");
  group
      .Add("otlp-sample-ratio", &o->otlp_sample_ratio,
           "Share of calls that are traced, of those without a traceparent, whose flag decides")
      ->check(CLI::Range(0.0, 1.0));
  group.AddChoice<LogFormat>("log-format", &o->log_format,
                             {{"text", LogFormat::kText}, {"json", LogFormat::kJson}},
                             "Form of the log on standard error");
  group.Add("log-level", &o->log_level, "Least severity that is logged")
      ->check(CLI::IsMember({"debug", "info", "warn", "error"}));
}

// Items of the file in order. CLI11 throws.
absl::StatusOr<std::vector<CLI::ConfigItem>> ReadConfigFile(const std::string& path) {
  try {
    return CLI::ConfigTOML().from_file(path);
  } catch (const CLI::Error& error) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": ", error.what()));
  }
}

}  // namespace

void AddModelOptions(CLI::App* app, ServerOptions* o) {
  OptionGroup group(app, "Model");
  group.Add("model", &o->model_dir,
            "Folder of a Hugging Face model: config.json and safetensors (required)");
  group.Add("model-name", &o->model_name, "Name that requests may give; empty: the folder's name");
  group
      .Add("follow-links", &o->follow_links,
           "Follow links in the model's folder to files outside of it, as volumes may have them")
      ->default_str("false");
  group.Add("device", &o->backend.device, "Where to compute: cpu or cuda")
      ->check(CLI::IsMember({"cpu", "cuda"}));
  group.AddChoice<ComputeDType>(
      "dtype", &o->backend.dtype,
      {{"auto", ComputeDType::kAuto}, {"bf16", ComputeDType::kBF16}, {"f32", ComputeDType::kF32}},
      "Type of activations and of the KV cache");
  group.Add("threads", &o->backend.num_threads, "CPU threads; 0: all that the process may use")
      ->check(CLI::NonNegativeNumber);
  group
      .Add("fastest-products", &o->backend.fastest_products,
           "CUDA: the fastest matrix products whatever the number of rows; results then depend in "
           "their last bits on what runs together")
      ->default_str("false");
  group.Add("max-prompt-tokens", &o->max_prompt_tokens, "Longest prompt; 0: the model's context")
      ->check(CLI::NonNegativeNumber);
  group.AddPositive("piece-tokens", &o->piece_tokens,
                    "Tokens of a prompt that go through the layers at once; a multiple of 128");
  group
      .Add("batch-tokens", &o->batch_tokens,
           "Prompts run together up to that many tokens; those that fit run between the layers of "
           "longer ones; a multiple of 128; 0: 2048")
      ->check(CLI::NonNegativeNumber);
  group
      .Add("kv-pool-tokens", &o->kv_pool_tokens,
           "Tokens whose KV fits into memory at once, the prefix cache included; 0: one longest "
           "prompt and four batches")
      ->check(CLI::NonNegativeNumber);
  group
      .Add("prefix-cache", &o->prefix_cache,
           "Keep the KV of prompts that were computed, for others that begin alike")
      ->default_str("true");  // CLI11 says 1
  group.AddBytes("host-kv-bytes", &o->host_kv_bytes,
                 "Host memory for KV on its way out; 0: what 8 longest prompts have, 2 GiB at most",
                 CLI::NonNegativeNumber);
}

void AddServerOptions(CLI::App* app, ServerOptions* options) {
  AddModelOptions(app, options);
  AddAttentionOptions(app, &options->attention);
  AddListenerOptions(app, options);
  AddRequestOptions(app, options);
  AddConnectionOptions(app, &options->connections);
  AddOperationOptions(app, options);
}

absl::Status ApplyConfigFile(CLI::App* app, const std::string& path) {
  HEADSTART_ASSIGN_OR_RETURN(const std::vector<CLI::ConfigItem> items, ReadConfigFile(path));
  for (const CLI::ConfigItem& item : items) {
    CLI::Option* option =
        item.parents.empty() ? app->get_option_no_throw("--" + item.name) : nullptr;
    if (option == nullptr || !option->get_configurable()) {
      return absl::InvalidArgumentError(
          absl::StrCat(path, ": ", item.fullname(), " is not an option of ", app->get_name()));
    }
    if (option->count() > 0) continue;  // command line or environment
    // What has no default is printed as name = "".
    if (option->get_default_str().empty() && item.inputs == std::vector<std::string>{""}) continue;
    try {
      option->add_result(item.inputs);
      option->run_callback();
    } catch (const CLI::Error& error) {
      return absl::InvalidArgumentError(absl::StrCat(path, ": ", error.what()));
    }
  }
  return absl::OkStatus();
}

std::string HashOptions(const CLI::App& app) {
  std::string all;
  for (const CLI::Option* option : app.get_options()) {
    if (!option->get_configurable() || option->get_group() == kListeners) continue;
    absl::StrAppend(
        &all, option->get_name(), "=",
        option->count() > 0 ? CLI::detail::join(option->results(), ",") : option->get_default_str(),
        "\n");
  }
  std::array<uint8_t, SHA256_DIGEST_LENGTH> digest;
  SHA256(reinterpret_cast<const uint8_t*>(all.data()), all.size(), digest.data());
  return absl::BytesToHexString({reinterpret_cast<const char*>(digest.data()), 6});
}

std::string EnvironmentName(const std::string& flag) {
  return "HEADSTART_" + absl::AsciiStrToUpper(absl::StrReplaceAll(flag, {{"-", "_"}}));
}

}  // namespace headstart
