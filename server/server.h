// A prefill server: puts engine, gRPC service and admin server together.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <thread>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "engine/engine.h"
#include "kernels/base/instant.h"
#include "server/lifecycle.h"
#include "server/net/listener.h"
#include "server/net/tls.h"
#include "server/ops/admin_server.h"
#include "server/ops/recent_prompts.h"
#include "server/ops/span_exporter.h"
#include "server/ops/status_report.h"
#include "server/ops/tracer.h"
#include "server/rpc/grpc_server.h"
#include "server/rpc/prefill_service.h"
#include "server/rpc/service_context.h"

namespace headstart {

// What the server's options say about its engine.
EngineOptions ToEngineOptions(const ServerOptions& options);

class Server {
 public:
  // Makes the engine, on a thread of its own. An error ends the server with it.
  using EngineFactory = std::function<absl::StatusOr<std::unique_ptr<Engine>>()>;

  // Listens first, so that a taken port is known at once, then loads the model in the background.
  // UNAVAILABLE: a port; INVALID_ARGUMENT: an address or a certificate.
  static absl::StatusOr<std::unique_ptr<Server>> Start(ServerOptions options,
                                                       EngineFactory make_engine);
  // Ends what is left, without waiting for requests to finish. Waits for a model that is being
  // loaded.
  ~Server();
  Server(const Server&) = delete;
  Server& operator=(const Server&) = delete;

  int port() const { return listener_->port(); }
  int admin_port() const { return admin_ == nullptr ? 0 : admin_->port(); }

  // The model is loaded (OK) or never will be.
  absl::Status WaitUntilLoaded() const { return lifecycle_.WaitUntilLoaded(); }
  bool loading() const { return lifecycle_.loading(); }

  // From now on no request is taken; those that were may finish. Does not wait.
  void Drain();

  // Waits for Drain, or for a failure.
  void WaitForEnd() const { lifecycle_.WaitForEnd(); }

  // After WaitForEnd: waits for requests in flight and for detached KV that is kept, up to the
  // drain timeout, then ends every call. OK when all finished in time. Otherwise why not: the load
  // failed, the backend was lost, requests had to be cancelled.
  absl::Status Shutdown();

  MetricsSnapshot Snapshot() const;

 private:
  explicit Server(ServerOptions options);
  absl::Status Listen();
  absl::Status StartAdmin();
  void StartLoading(EngineFactory make_engine);

  // On the loading thread.
  absl::Status ServeModel(std::unique_ptr<Engine> engine, absl::Duration load_time);
  void Fail(absl::Status why);

  void OnChange(Lifecycle::Phase phase, bool healthy);
  // Tells the lifecycle what compute does, again and again.
  void WatchCompute();
  void WatchCertificates();
  absl::Status Live() const;
  absl::Status Ready() const;
  AdminHandlers MakeAdminHandlers();
  StatusReport Report() const;

  const ServerOptions options_;
  const Instant started_at_ = Instant::Now();
  Metrics metrics_;
  RecentPrompts recent_prompts_;
  const std::unique_ptr<SpanExporter> span_exporter_;  // null: no traces
  Tracer tracer_;
  Lifecycle lifecycle_;
  ServiceContext context_;
  ServedModel served_;  // published through context_.model
  std::unique_ptr<Engine> engine_;
  Timer timer_;
  PrefillService service_;
  ConnectionLedger ledger_;
  std::unique_ptr<TlsIdentity> tls_;  // null: plain text
  std::unique_ptr<Listener> listener_;
  GrpcServer grpc_;
  std::unique_ptr<AdminServer> admin_;
  std::atomic<int64_t> drain_deadline_{0};  // Unix time; 0: none
  std::thread loading_thread_;
  std::unique_ptr<Timer> watch_timer_;  // by itself, because it logs
};

}  // namespace headstart
