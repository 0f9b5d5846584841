// Everything that can be set about a server, as plain values.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "kernels/backend.h"
#include "server/ops/objective.h"
#include "server/rpc/attention_request.h"

namespace headstart {

enum class LogFormat : uint8_t { kText, kJson };
enum class Reflection : uint8_t { kAuto, kOn, kOff };

struct ServerTlsOptions {
  std::string cert_file;  // PEM chain; empty: plain text
  std::string key_file;
  std::string client_ca_file;  // not empty: clients must show a certificate that it signed
  // Not empty: that certificate must carry one of these subject alternative names.
  std::vector<std::string> allowed_sans;
  int32_t reload_seconds = 60;

  bool enabled() const { return !cert_file.empty(); }
};

// Limits of one gRPC listener. Reasons for the values are in README.md.
struct ConnectionOptions {
  int64_t max_connections = 1024;
  int64_t max_connections_per_peer = 256;
  int32_t max_streams_per_connection = 128;
  int32_t max_message_bytes = 16 << 20;
  int32_t max_metadata_bytes = 8 << 10;
  int64_t receive_memory_bytes = 256 << 20;
  absl::Duration handshake_timeout = absl::Seconds(10);
  absl::Duration keepalive_time = absl::Seconds(30);
  absl::Duration keepalive_timeout = absl::Seconds(10);
  absl::Duration min_ping_interval = absl::Seconds(10);
  absl::Duration max_idle = absl::Minutes(5);
  absl::Duration max_age = absl::Minutes(30);
};

struct ServerOptions {
  // ---- model
  std::string model_dir;
  std::string model_name;  // empty: the folder's name
  bool follow_links = false;
  BackendOptions backend;
  int64_t max_prompt_tokens = 0;  // 0: the model's context
  int64_t piece_tokens = 8192;
  int64_t batch_tokens = 0;    // 0: the engine's default
  int64_t kv_pool_tokens = 0;  // 0: the engine's default
  bool prefix_cache = true;
  int64_t host_kv_bytes = 0;  // 0: the engine's default
  AttentionDefaults attention;

  // ---- listeners; port 0 takes a free one
  std::string listen = "127.0.0.1:8443";
  std::string admin_listen = "127.0.0.1:9090";  // empty: no admin server
  std::string admin_socket;  // path of a Unix socket that also takes POST /drain; empty: none
  std::string port_file;
  std::string fetch_address;  // where clients reach FetchKv; empty: where they called
  ServerTlsOptions tls;
  ConnectionOptions connections;
  Reflection reflection = Reflection::kAuto;

  // ---- requests
  int64_t max_queue_requests = 64;
  int64_t max_queue_tokens = 1 << 20;
  absl::Duration priority_ageing = absl::Seconds(10);
  absl::Duration default_deadline = absl::Seconds(120);
  absl::Duration max_deadline = absl::Minutes(10);
  absl::Duration first_message_timeout = absl::Seconds(10);
  absl::Duration write_stall_timeout = absl::Seconds(30);
  int64_t min_kv_rate = 128 << 10;  // bytes a second; 0: any
  absl::Duration default_lease = absl::Seconds(60);
  absl::Duration max_lease = absl::Minutes(10);

  // ---- operations
  absl::Duration drain_timeout = absl::Seconds(60);
  absl::Duration stuck_after = absl::Minutes(2);
  Objective objective;
  std::string otlp_endpoint;  // where traces go, see ParseOtlpEndpoint; empty: none are made
  double otlp_sample_ratio = 1;
  LogFormat log_format = LogFormat::kText;
  std::string log_level = "info";

  // Of all that is set but listeners, so that servers which should be alike can be compared; empty
  // where nobody has made it.
  std::string hash;
};

// What can be said without opening a file or a port. INVALID_ARGUMENT names the flag.
absl::Status ValidateOptions(const ServerOptions& options);

// The name under which the model is served.
std::string ServedModelName(const ServerOptions& options);

}  // namespace headstart
