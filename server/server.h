// A prefill server: gRPC service, admin server, engine, and what lies between them.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/engine.h"
#include "kernels/base/mutex.h"
#include "server/net/listener.h"
#include "server/ops/admin_server.h"
#include "server/rpc/grpc_server.h"
#include "server/rpc/prefill_service.h"
#include "server/rpc/service_context.h"

namespace headstart {

class Server {
 public:
  // Makes the engine, on the worker's thread. An error ends the server with it.
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
  absl::Status WaitUntilLoaded();

  // From now on no request is taken; those that were may finish. Does not wait.
  void Drain();

  // Waits for Drain, or for a failure.
  void WaitForEnd();

  // After WaitForEnd: waits for requests in flight, up to the drain timeout, then ends every call.
  // OK when all finished in time. Otherwise why not: the load failed, the backend was lost,
  // requests had to be cancelled.
  absl::Status Shutdown();

  bool loading();

  MetricsSnapshot Snapshot();

 private:
  enum class Phase : uint8_t { kLoading, kServing, kDraining, kFailed };

  explicit Server(ServerOptions options);
  absl::Status Listen();
  void StartWorker(EngineFactory make_engine);
  absl::Status StartAdmin();

  // On the worker's thread.
  absl::StatusOr<PrefillWorker::Run> Load(const EngineFactory& make_engine);
  absl::Status ServeModel(std::unique_ptr<Engine> engine, absl::Duration load_time);
  absl::StatusOr<PrefillResult> Run(const PrefillJob& job, KvSink& sink);

  void Fail(absl::Status why);
  // Tells health service and log what holds now.
  void UpdateHealth() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void ScheduleProgressCheck();
  // Is compute stuck?
  void CheckProgress();
  absl::Status Live();
  absl::Status Ready();
  AdminHandlers MakeAdminHandlers();

  const ServerOptions options_;
  Metrics metrics_;
  Admission admission_;
  ServiceContext context_;
  ServedModel served_;  // published through context_.model
  std::unique_ptr<Engine> engine_;
  Timer timer_;
  std::unique_ptr<PrefillWorker> worker_;
  PrefillService service_;
  std::unique_ptr<Listener> listener_;
  GrpcServer grpc_;
  std::unique_ptr<AdminServer> admin_;

  Mutex mutex_;
  CondVar phase_changed_;
  Phase phase_ ABSL_GUARDED_BY(mutex_) = Phase::kLoading;
  bool load_over_ ABSL_GUARDED_BY(mutex_) = false;
  absl::Status failure_ ABSL_GUARDED_BY(mutex_);
  bool stuck_ ABSL_GUARDED_BY(mutex_) = false;
  int64_t layers_seen_ ABSL_GUARDED_BY(mutex_) = 0;
  absl::Time last_progress_ ABSL_GUARDED_BY(mutex_) = absl::InfinitePast();
  Timer::Id progress_timer_ ABSL_GUARDED_BY(mutex_) = Timer::kNone;
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
};

}  // namespace headstart
