#include "server/server.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "kernels/base/nonfinite.h"
#include "kernels/base/status_macros.h"
#include "server/error.h"
#include "server/net/self_check.h"
#include "server/net/tls.h"
#include "server/ops/logging.h"
#include "server/version.h"

namespace headstart {
namespace {

constexpr absl::Duration kProgressInterval = absl::Seconds(1);
// For status and trailers of the last calls, and for calls of other services (health watches).
constexpr absl::Duration kGoodbye = absl::Seconds(1);
// Open files that are not connections of clients.
constexpr int64_t kOtherFiles = 64;
constexpr absl::Duration kSelfCheckTimeout = absl::Seconds(2);

absl::Status Unavailable(ErrorReason reason, absl::string_view message) {
  return MakeError(absl::StatusCode::kUnavailable, reason, message);
}

ListenerLimits LimitConnections(const ConnectionOptions& options) {
  const int64_t files = RaiseFileLimit();
  ListenerLimits limits{options.max_connections, options.max_connections_per_peer};
  if (limits.max_connections > files - kOtherFiles) {
    limits.max_connections = std::max<int64_t>(files - kOtherFiles, 1);
    Log(LogLevel::kWarn, "fewer connections than asked for: open files are limited",
        {{"max_connections", limits.max_connections}, {"open_files_limit", files}});
  }
  return limits;
}

bool WantsReflection(Reflection reflection, const std::string& host) {
  return reflection == Reflection::kOn || (reflection == Reflection::kAuto && IsLoopback(host));
}

ModelFacts FactsOf(const Engine& engine, absl::Duration load_time) {
  ModelFacts facts;
  facts.model_hash = engine.model_hash();
  facts.architecture = engine.config().architecture;
  facts.kv_dtype = std::string(DTypeName(engine.kv_dtype()));
  facts.backend = engine.backend().name();
  facts.device = engine.backend().device();
  facts.num_layers = engine.config().num_layers;
  facts.block_tokens = kBlockTokens;
  facts.num_blocks = engine.block_pool().num_pages();
  facts.load_time = load_time;
  return facts;
}

// What a request that says nothing about attention gets. A usage error when it does not suit the
// model.
absl::StatusOr<ResolvedAttention> DefaultAttention(const Engine& engine,
                                                   const ServerOptions& options) {
  absl::StatusOr<ResolvedAttention> attention =
      ResolveAttention({}, options.attention, engine.config().heads);
  if (!attention.ok()) return AsUsageError(attention.status());
  PrefillJob shortest;
  shortest.token_ids = {0};
  shortest.attention = attention->options;
  const absl::Status valid = engine.Validate(shortest);
  if (!valid.ok()) return AsUsageError(valid);
  return attention;
}

// A lost backend, as opposed to a request that failed.
bool LosesEngine(const absl::Status& status) {
  return status.code() == absl::StatusCode::kInternal && !IsNonFiniteError(status);
}

}  // namespace

// ---- start

absl::StatusOr<std::unique_ptr<Server>> Server::Start(ServerOptions options,
                                                      EngineFactory make_engine) {
  std::unique_ptr<Server> server(new Server(std::move(options)));
  HEADSTART_RETURN_IF_ERROR(server->Listen());
  HEADSTART_RETURN_IF_ERROR(server->StartAdmin());
  server->StartWorker(std::move(make_engine));
  return server;
}

Server::Server(ServerOptions options)
    : options_(std::move(options)),
      metrics_(ServedModelName(options_)),
      admission_(options_.admission,
                 Unavailable(ErrorReason::kLoading, "the model is being loaded")),
      service_(&context_) {
  context_.options = &options_;
  context_.model_name = ServedModelName(options_);
  context_.admission = &admission_;
  context_.timer = &timer_;
  context_.metrics = &metrics_;
}

absl::Status Server::Listen() {
  HEADSTART_ASSIGN_OR_RETURN(const HostPort address, ParseHostPort(options_.listen));
  HEADSTART_ASSIGN_OR_RETURN(auto credentials, MakeCredentials(options_.tls));
  HEADSTART_ASSIGN_OR_RETURN(listener_,
                             Listener::Create(address, LimitConnections(options_.connections)));
  if (!options_.tls.enabled() && !IsLoopback(address.host)) {
    Log(LogLevel::kWarn, "plain text beyond this machine: prompts and KV can be read on the way",
        {{"listen", options_.listen}});
  }
  HEADSTART_ASSIGN_OR_RETURN(
      grpc_, BuildGrpcServer(options_, WantsReflection(options_.reflection, address.host),
                             std::move(credentials), &service_));
  return absl::OkStatus();
}

absl::Status Server::StartAdmin() {
  if (options_.admin_listen.empty()) return absl::OkStatus();
  HEADSTART_ASSIGN_OR_RETURN(const HostPort address, ParseHostPort(options_.admin_listen));
  HEADSTART_ASSIGN_OR_RETURN(admin_, AdminServer::Start(address, MakeAdminHandlers()));
  return absl::OkStatus();
}

void Server::StartWorker(EngineFactory make_engine) {
  worker_ = std::make_unique<PrefillWorker>(
      [this, make_engine = std::move(make_engine)] { return Load(make_engine); }, &timer_);
  context_.worker = worker_.get();
  ScheduleProgressCheck();
  // Last: the first call may come right away.
  listener_->Start([this](int fd, bool own) {
    GrpcServer::Acceptor::NewConnectionParameters connection;
    connection.listener_fd = listener_->fd();
    connection.fd = fd;
    (own ? grpc_.own_acceptor : grpc_.acceptor)->HandleNewConnection(&connection);
  });
}

absl::StatusOr<PrefillWorker::Run> Server::Load(const EngineFactory& make_engine) {
  const absl::Time began = absl::Now();
  absl::StatusOr<std::unique_ptr<Engine>> engine = make_engine();
  const absl::Status status =
      engine.ok() ? ServeModel(*std::move(engine), absl::Now() - began) : engine.status();
  if (!status.ok()) Fail(status);
  MutexLock lock(&mutex_);
  load_over_ = true;
  phase_changed_.SignalAll();
  if (!status.ok()) return status;
  return [this](const PrefillJob& job, KvSink& sink) { return Run(job, sink); };
}

absl::Status Server::ServeModel(std::unique_ptr<Engine> engine, absl::Duration load_time) {
  engine_ = std::move(engine);
  HEADSTART_ASSIGN_OR_RETURN(ResolvedAttention attention, DefaultAttention(*engine_, options_));
  served_ = {engine_.get(), context_.model_name, &options_, std::move(attention)};
  context_.model.store(&served_);
  metrics_.SetModel(FactsOf(*engine_, load_time));
  Log(LogLevel::kInfo, "model loaded",
      {{"model", served_.name},
       {"model_hash", engine_->model_hash()},
       {"device", engine_->backend().device()},
       {"max_prompt_tokens", engine_->options().max_prompt_tokens},
       {"seconds", absl::ToDoubleSeconds(load_time)}});
  MutexLock lock(&mutex_);
  if (phase_ != Phase::kLoading) return absl::OkStatus();  // draining already
  phase_ = Phase::kServing;
  last_progress_ = absl::Now();
  admission_.Open();
  UpdateHealth();
  return absl::OkStatus();
}

// ---- work

absl::StatusOr<PrefillResult> Server::Run(const PrefillJob& job, KvSink& sink) {
  {
    MutexLock lock(&mutex_);
    last_progress_ = absl::Now();
    if (phase_ == Phase::kFailed) {
      return Unavailable(ErrorReason::kEngineLost, "the backend was lost before this request");
    }
  }
  absl::StatusOr<PrefillResult> result = engine_->RunPrefill(job, sink);
  if (LosesEngine(result.status())) Fail(result.status());
  return result;
}

void Server::Fail(absl::Status why) {
  Log(LogLevel::kError, "the server gives up",
      {{"code", absl::StatusCodeToString(why.code())}, {"message", why.message()}});
  admission_.Close(
      Unavailable(ErrorReason::kEngineLost, "the server gave up its model and shuts down"));
  MutexLock lock(&mutex_);
  phase_ = Phase::kFailed;
  failure_ = std::move(why);
  UpdateHealth();
  phase_changed_.SignalAll();
}

// ---- health

void Server::UpdateHealth() { SetServing(*grpc_.server, phase_ == Phase::kServing && !stuck_); }

void Server::ScheduleProgressCheck() {
  MutexLock lock(&mutex_);
  if (stopping_) return;
  progress_timer_ = timer_.Schedule(absl::Now() + kProgressInterval, [this] { CheckProgress(); });
}

void Server::CheckProgress() {
  const bool busy = worker_->busy();
  const ServedModel* model = context_.model.load();
  const int64_t layers = model == nullptr ? 0 : model->engine->layers_done();
  {
    MutexLock lock(&mutex_);
    const absl::Time now = absl::Now();
    if (!busy || layers != layers_seen_) last_progress_ = std::max(last_progress_, now);
    layers_seen_ = layers;
    const bool stuck = now - last_progress_ > options_.stuck_after;
    if (stuck != stuck_) {
      Log(stuck ? LogLevel::kError : LogLevel::kInfo,
          stuck ? "stuck: no layer finishes" : "compute goes on again", {{"layers_done", layers}});
      stuck_ = stuck;
      UpdateHealth();
    }
  }
  ScheduleProgressCheck();
}

absl::Status Server::Live() {
  {
    MutexLock lock(&mutex_);
    if (stuck_) return absl::UnavailableError("stuck: no layer finishes");
    if (phase_ == Phase::kFailed) return absl::UnavailableError("failed");
  }
  return CheckThroughListener(*listener_, kSelfCheckTimeout);
}

absl::Status Server::Ready() {
  MutexLock lock(&mutex_);
  if (stuck_) return absl::UnavailableError("stuck: no layer finishes");
  switch (phase_) {
    case Phase::kLoading:
      return absl::UnavailableError("loading");
    case Phase::kServing:
      return absl::OkStatus();
    case Phase::kDraining:
      return absl::UnavailableError("draining");
    case Phase::kFailed:
      return absl::UnavailableError("failed");
  }
  return absl::OkStatus();
}

AdminHandlers Server::MakeAdminHandlers() {
  return {
      .metrics = [this] { return metrics_.Serialize(Snapshot()); },
      .live = [this] { return Live(); },
      .ready = [this] { return Ready(); },
      .version =
          [this] {
            return nlohmann::json({{"version", kVersion}, {"model", context_.model_name}}).dump() +
                   "\n";
          },
      .drain = [this] { Drain(); }};
}

MetricsSnapshot Server::Snapshot() {
  MetricsSnapshot s;
  s.load = admission_.load();
  s.limits = options_.admission;
  if (const ServedModel* model = context_.model.load(); model != nullptr) {
    const BlockPool& pool = model->engine->block_pool();
    s.layers_done = model->engine->layers_done();
    s.pool_blocks = pool.num_pages();
    s.pool_free = pool.free_pages();
    s.pool_acquired = pool.acquired();
    s.pool_released = pool.released();
  }
  const ListenerStats connections = listener_->stats();
  s.connections = connections.open;
  s.connections_accepted = connections.accepted;
  for (size_t i = 0; i < kShedReasonNames.size(); ++i) {
    s.connections_shed.emplace_back(std::string(kShedReasonNames[i]), connections.shed[i]);
  }
  MutexLock lock(&mutex_);
  s.ready = phase_ == Phase::kServing && !stuck_;
  s.draining = phase_ == Phase::kDraining;
  return s;
}

// ---- the end

absl::Status Server::WaitUntilLoaded() {
  MutexLock lock(&mutex_);
  while (!load_over_) phase_changed_.Wait(&mutex_);
  return failure_;
}

void Server::Drain() {
  MutexLock lock(&mutex_);
  if (phase_ == Phase::kDraining || phase_ == Phase::kFailed) return;
  admission_.Close(MakeRetryableError(absl::StatusCode::kUnavailable, ErrorReason::kDraining,
                                      "the server is draining", absl::Seconds(1)));
  phase_ = Phase::kDraining;
  Log(LogLevel::kInfo, "draining", {{"inflight_requests", admission_.load().inflight_requests}});
  UpdateHealth();
  phase_changed_.SignalAll();
}

void Server::WaitForEnd() {
  MutexLock lock(&mutex_);
  while (phase_ == Phase::kLoading || phase_ == Phase::kServing) phase_changed_.Wait(&mutex_);
}

absl::Status Server::Shutdown() {
  absl::Status failure;
  {
    MutexLock lock(&mutex_);
    failure = failure_;
  }
  const absl::Duration patience = failure.ok() ? options_.drain_timeout : kGoodbye;
  const bool idle = admission_.WaitUntilIdle(absl::Now() + patience);
  const int64_t left = admission_.load().inflight_requests;
  context_.cancelling_all.store(true);
  listener_->Stop();
  grpc_.server->Shutdown(
      absl::ToChronoTime(absl::Now() + (idle ? kGoodbye : absl::ZeroDuration())));
  if (!failure.ok() || idle) return failure;
  return absl::DeadlineExceededError(
      absl::StrCat("the drain timeout passed: ", left, " accepted requests were cancelled"));
}

bool Server::loading() {
  MutexLock lock(&mutex_);
  return !load_over_;
}

Server::~Server() {
  Timer::Id progress_timer = Timer::kNone;
  {
    MutexLock lock(&mutex_);
    stopping_ = true;
    progress_timer = progress_timer_;
  }
  timer_.Cancel(progress_timer);
  admission_.Close(Unavailable(ErrorReason::kDraining, "the server shuts down"));
  context_.cancelling_all.store(true);
  admin_.reset();
  if (listener_ != nullptr) listener_->Stop();
  if (grpc_.server != nullptr) grpc_.server->Shutdown(std::chrono::system_clock::now());
  worker_.reset();
}

}  // namespace headstart
