// A connection to a Headstart server, for decode nodes.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "client/kv_receiver.h"
#include "headstart/v1/prefill.pb.h"

namespace grpc {
class Channel;
class ClientContext;
}  // namespace grpc

namespace headstart {

struct TlsOptions {
  bool enabled = false;
  std::string ca_file;    // PEM; empty: the system's authorities
  std::string cert_file;  // PEM, both or none: mTLS
  std::string key_file;
  std::string server_name;  // expected in the certificate; empty: the host of the target
};

// When a call is tried again: only before its first chunk, only for UNAVAILABLE (and QUEUE_FULL
// where wanted), and never past its deadline. The pause is what the server's RetryInfo says, else
// it doubles from initial to max, +-20 %.
struct RetryOptions {
  int max_attempts = 3;
  absl::Duration initial_backoff = absl::Milliseconds(100);
  absl::Duration max_backoff = absl::Seconds(5);
  bool when_queue_full = false;
  // Told of every pause, on the calling thread: what went wrong, and how long it will be.
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
};

// Ends a running Prefill from another thread. One token serves one call.
class CancelToken {
 public:
  void Cancel();
  bool cancelled() const;

 private:
  friend class PrefillClient;
  // Attaches the context that Cancel is to reach; null detaches it.
  void Attach(grpc::ClientContext* context);
  // False when the token was cancelled meanwhile.
  bool SleepUntil(absl::Time time) const;

  mutable absl::Mutex mutex_;
  bool cancelled_ ABSL_GUARDED_BY(mutex_) = false;
  grpc::ClientContext* context_ ABSL_GUARDED_BY(mutex_) = nullptr;
};

// When things happened, counted from the start of the last attempt.
struct PrefillTiming {
  absl::Duration accepted;
  absl::Duration manifest;
  absl::Duration first_chunk;
  absl::Duration last_chunk;
  absl::Duration completed;
};

struct PrefillOutcome {
  v1::Accepted accepted;
  v1::Completed completed;  // first token, manifest with densities, statistics
  PrefillTiming timing;
  int attempts = 1;
};

// Thread-safe; calls share one connection. Several clients have several, also to the same server.
class PrefillClient {
 public:
  // INVALID_ARGUMENT: no target, or a TLS file that can't be read. Does not connect yet.
  static absl::StatusOr<std::unique_ptr<PrefillClient>> Create(const PrefillClientOptions& options);

  // Sends the prompt and receives its KV on the calling thread. What the request says (tokens,
  // model, dtype, dense) is added to `receive.expected`; the callbacks may see an attempt from its
  // beginning again when it is retried before its first chunk. `cancel` may be null.
  //   the server's status, with its details as payloads (see grpc_status.h)
  //   DATA_LOSS           the stream was wrong, or broke after its first chunk
  //   CANCELLED           by `cancel`
  //   DEADLINE_EXCEEDED   the timeout
  //   or what a callback returned
  absl::StatusOr<PrefillOutcome> Prefill(const v1::PrefillRequest& request,
                                         KvReceiverOptions receive,
                                         CancelToken* cancel = nullptr) const;

  absl::StatusOr<v1::GetModelInfoResponse> GetModelInfo(const std::string& model = "") const;
  absl::StatusOr<v1::GetServerInfoResponse> GetServerInfo() const;

 private:
  struct Attempt;
  PrefillClient(PrefillClientOptions options, std::shared_ptr<grpc::Channel> channel);
  absl::Status RunAttempt(const v1::PrefillRequest& request, absl::Time deadline,
                          CancelToken& cancel, Attempt& attempt) const;

  const PrefillClientOptions options_;
  const std::shared_ptr<grpc::Channel> channel_;
};

}  // namespace headstart
