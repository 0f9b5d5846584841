// How a client connects, waits and tries again.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"

namespace headstart {

// The files are looked at again every few seconds; new connections get what they say then.
struct TlsOptions {
  bool enabled = false;
  std::string ca_file;    // PEM; empty: the system's authorities
  std::string cert_file;  // PEM, both or none: mTLS
  std::string key_file;
  std::string server_name;  // expected in the certificate; empty: the host of the target
};

// When a call is tried again: only before its first chunk, only for UNAVAILABLE (and QUEUE_FULL
// where wanted), and never past its deadline. A stream of detached KV that broke goes on after its
// last chunk at any time, max_attempts times without a chunk in between. The pause is what the
// server's RetryInfo says, else it doubles from initial to max, +-20 %.
struct RetryOptions {
  int max_attempts = 3;
  absl::Duration initial_backoff = absl::Milliseconds(100);
  absl::Duration max_backoff = absl::Seconds(5);
  bool when_queue_full = false;
  // Told of every pause before a call is tried again, on the calling thread: what went wrong, and
  // how long it will be.
  std::function<void(const absl::Status&, absl::Duration)> on_retry = nullptr;
};

struct PrefillClientOptions {
  // As gRPC names it: host:port, dns:///name:port (all addresses take turns, health decides),
  // ipv4:…, unix:….
  std::string target;
  TlsOptions tls;
  absl::Duration timeout = absl::Seconds(120);  // of a whole call with its retries
  bool wait_for_ready = false;                  // wait for the server to come up, until the timeout
  absl::Duration keepalive_time = absl::Seconds(30);
  absl::Duration keepalive_timeout = absl::Seconds(10);
  int32_t max_message_bytes = 16 << 20;
  RetryOptions retry;

  // Connections that the KV of one prompt comes on, at most kMaxConnections. 1: on the call's own.
  // More: as detached KV, each on a thread of its own. 0: one for every 32 MiB of KV.
  int connections = 0;
  // The most that 0 takes. 0: half of the cores, at most 8.
  int max_automatic_connections = 0;
  // Hosts that a server may name to fetch its KV from, besides the target's own and the one that
  // the call reached; "*": any. Names and addresses as the server writes them.
  std::vector<std::string> allowed_fetch_hosts;
};

// As many parts as a request may announce.
inline constexpr int kMaxConnections = 64;

}  // namespace headstart
