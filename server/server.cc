#include "server/server.h"

#include <algorithm>
#include <cstdlib>
#include <nlohmann/json.hpp>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/attention_options.h"
#include "engine/error.h"
#include "kernels/base/check.h"
#include "kernels/base/instant.h"
#include "kernels/base/status_macros.h"
#include "proto/grpc_time.h"
#include "server/net/self_check.h"
#include "server/ops/logging.h"
#include "server/ops/otlp_sink.h"
#include "server/ops/stacks.h"
#include "server/version.h"

namespace headstart {
namespace {

constexpr absl::Duration kWatchInterval = absl::Seconds(1);
// For status and trailers of the last calls, and for calls of other services (health watches).
constexpr absl::Duration kGoodbye = absl::Seconds(1);
// Open files that are not connections of clients.
constexpr int64_t kOtherFiles = 64 + HttpServer::kMaxConnections;
constexpr absl::Duration kSelfCheckTimeout = absl::Seconds(2);
constexpr absl::Duration kStackPatience = absl::Milliseconds(200);  // for each thread

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
  facts.kv_dtype = std::string(DTypeName(engine.geometry().dtype));
  facts.backend = engine.backend().name();
  facts.device = engine.backend().device();
  facts.num_layers = engine.config().num_layers;
  facts.block_tokens = kBlockTokens;
  facts.num_blocks = engine.page_pool().num_pages();
  facts.load_time = load_time;
  return facts;
}

// What a request that says nothing about attention gets. A usage error when it does not suit the
// model.
absl::StatusOr<ResolvedAttention> DefaultAttention(const ModelConfig& config,
                                                   const ServerOptions& options) {
  absl::StatusOr<ResolvedAttention> attention =
      ResolveAttention({}, options.attention, config.heads);
  if (!attention.ok()) return AsUsageError(attention.status());
  const absl::Status valid =
      ValidateAttentionOptions(attention->options, config.heads, config.num_layers);
  if (!valid.ok()) return AsUsageError(valid);
  return attention;
}

// Who this is, for whoever sees traces of many.
TraceResource ResourceOf(const ServerOptions& options) {
  TraceResource resource;
  const auto add = [&resource](const char* key, const std::string& value) {
    if (value.empty()) return;
    auto* attribute = resource.add_attributes();
    attribute->set_key(key);
    attribute->mutable_value()->set_string_value(value);
  };
  const char* host = std::getenv("HOSTNAME");  // NOLINT(concurrency-mt-unsafe): a pod's name
  add("service.name", "headstart");
  add("service.version", kVersion);
  add("service.instance.id", host == nullptr ? "" : host);
  add("host.name", host == nullptr ? "" : host);
  add("headstart.model", ServedModelName(options));
  return resource;
}

std::unique_ptr<SpanExporter> MakeSpanExporter(const ServerOptions& options) {
  if (options.otlp_endpoint.empty()) return nullptr;
  const absl::StatusOr<OtlpEndpoint> endpoint = ParseOtlpEndpoint(options.otlp_endpoint);
  HEADSTART_CHECK(endpoint.ok());  // valid options
  return std::make_unique<SpanExporter>(SpanExporterOptions(), ResourceOf(options),
                                        MakeOtlpSink(*endpoint));
}

}  // namespace

EngineOptions ToEngineOptions(const ServerOptions& options) {
  EngineOptions out;
  out.model_dir = options.model_dir;
  out.links = options.follow_links ? Links::kAnywhere : Links::kInside;
  out.model_name = ServedModelName(options);
  out.backend = options.backend;
  out.max_prompt_tokens = options.max_prompt_tokens;
  out.piece_tokens = options.piece_tokens;
  out.batch_tokens = options.batch_tokens;
  out.kv_pool_tokens = options.kv_pool_tokens;
  out.host_kv_bytes = options.host_kv_bytes;
  out.max_requests = options.max_queue_requests;
  out.max_tokens = options.max_queue_tokens;
  out.ageing = options.priority_ageing;
  out.default_lease = options.default_lease;
  out.max_lease = options.max_lease;
  out.stall_timeout = options.write_stall_timeout;
  return out;
}

// ---- start

absl::StatusOr<std::unique_ptr<Server>> Server::Start(ServerOptions options,
                                                      EngineFactory make_engine) {
  std::unique_ptr<Server> server(new Server(std::move(options)));
  HEADSTART_RETURN_IF_ERROR(server->Listen());
  HEADSTART_RETURN_IF_ERROR(server->StartAdmin());
  server->StartLoading(std::move(make_engine));
  return server;
}

Server::Server(ServerOptions options)
    : options_(std::move(options)),
      metrics_(
          {ServedModelName(options_), options_.backend.device, options_.hash, options_.objective}),
      span_exporter_(MakeSpanExporter(options_)),
      tracer_(options_.otlp_sample_ratio, span_exporter_.get()),
      lifecycle_(options_.stuck_after,
                 [this](Lifecycle::Phase phase, bool healthy) { OnChange(phase, healthy); }),
      service_(&context_),
      ledger_({.message_bytes = options_.connections.max_message_bytes,
               .metadata_bytes = options_.connections.max_metadata_bytes,
               .total_bytes = options_.connections.receive_memory_bytes}) {
  context_.ledger = &ledger_;
  context_.options = &options_;
  context_.model_name = ServedModelName(options_);
  context_.lifecycle = &lifecycle_;
  context_.timer = &timer_;
  context_.metrics = &metrics_;
  context_.recent_prompts = &recent_prompts_;
  context_.tracer = &tracer_;
}

absl::Status Server::Listen() {
  HEADSTART_ASSIGN_OR_RETURN(const HostPort address, ParseHostPort(options_.listen));
  std::shared_ptr<grpc::ServerCredentials> credentials = grpc::InsecureServerCredentials();
  if (options_.tls.enabled()) {
    HEADSTART_ASSIGN_OR_RETURN(tls_, TlsIdentity::Load(options_.tls));
    credentials = tls_->MakeCredentials();
  }
  HEADSTART_ASSIGN_OR_RETURN(
      listener_, Listener::Create(address, LimitConnections(options_.connections), &ledger_));
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
  HEADSTART_ASSIGN_OR_RETURN(
      admin_, AdminServer::Start(address, options_.admin_socket, MakeAdminHandlers()));
  return absl::OkStatus();
}

void Server::StartLoading(EngineFactory make_engine) {
  loading_thread_ = std::thread([this, make_engine = std::move(make_engine)] {
    const Instant began = Instant::Now();
    absl::StatusOr<std::unique_ptr<Engine>> engine = make_engine();
    const absl::Status status =
        engine.ok() ? ServeModel(*std::move(engine), Instant::Now() - began) : engine.status();
    if (!status.ok()) Fail(status);
  });
  watch_timer_ = std::make_unique<Timer>();
  WatchCompute();
  if (tls_ != nullptr) WatchCertificates();
  // Last: the first call may come right away.
  listener_->Start([this](int fd) { Serve(*grpc_.acceptor, listener_->fd(), fd); });
}

absl::Status Server::ServeModel(std::unique_ptr<Engine> engine, absl::Duration load_time) {
  engine_ = std::move(engine);
  HEADSTART_ASSIGN_OR_RETURN(ResolvedAttention attention,
                             DefaultAttention(engine_->config(), options_));
  served_ = {engine_.get(), context_.model_name, &options_, std::move(attention)};
  metrics_.SetModel(FactsOf(*engine_, load_time));
  engine_->OnLost([this](const absl::Status& why) { Fail(why); });
  engine_->Open();
  context_.model.store(&served_);
  Log(LogLevel::kInfo, "model loaded",
      {{"model", served_.name},
       {"model_hash", engine_->model_hash()},
       {"device", engine_->backend().device()},
       {"max_prompt_tokens", engine_->options().max_prompt_tokens},
       {"host_kv_bytes", engine_->options().host_kv_bytes},
       {"seconds", absl::ToDoubleSeconds(load_time)}});
  lifecycle_.Load();
  return absl::OkStatus();
}

// ---- life

void Server::OnChange(Lifecycle::Phase phase, bool healthy) {
  SetServing(*grpc_.server, healthy);
  const absl::Status closed = WhyClosedIn(phase);
  const ServedModel* model = context_.model.load();
  if (model != nullptr && !closed.ok()) model->engine->Close(closed);
}

void Server::Fail(absl::Status why) {
  Log(LogLevel::kError, "the server gives up",
      {{"code", absl::StatusCodeToString(why.code())}, {"message", why.message()}});
  lifecycle_.Fail(std::move(why));
}

void Server::Drain() {
  if (!lifecycle_.Drain()) return;
  drain_deadline_.store(absl::ToUnixSeconds(absl::Now() + options_.drain_timeout));
  Log(LogLevel::kInfo, "draining", {{"inflight_requests", Snapshot().load.inflight_requests}});
}

void Server::WatchCompute() {
  const ServedModel* model = context_.model.load();
  const bool computing = model != nullptr && model->engine->computing();
  const int64_t layers = model == nullptr ? 0 : model->engine->layers_done();
  if (const auto stuck = lifecycle_.WatchCompute(computing, layers, Instant::Now())) {
    Log(*stuck ? LogLevel::kError : LogLevel::kInfo,
        *stuck ? "stuck: no layer finishes" : "compute goes on again", {{"layers_done", layers}});
    // Whoever asks why comes when the process has been ended.
    if (*stuck) Log(LogLevel::kError, "stacks", {{"threads", AllStacks(kStackPatience)}});
  }
  watch_timer_->Schedule(Instant::Now() + kWatchInterval, [this] { WatchCompute(); });
}

void Server::WatchCertificates() {
  const absl::StatusOr<bool> reloaded = tls_->Reload();
  if (!reloaded.ok()) {
    Log(LogLevel::kWarn, "certificates refused: the last good ones stay",
        {{"message", reloaded.status().message()}});
  } else if (*reloaded) {
    Log(LogLevel::kInfo, "certificates reloaded",
        {{"not_after", absl::FormatTime(tls_->stats().not_after)}});
  }
  watch_timer_->Schedule(Instant::Now() + absl::Seconds(options_.tls.reload_seconds),
                         [this] { WatchCertificates(); });
}

absl::Status Server::Live() const {
  HEADSTART_RETURN_IF_ERROR(lifecycle_.Live());
  const auto serve_health = [this](int fd) { Serve(*grpc_.own_acceptor, listener_->fd(), fd); };
  return CheckThroughListener(*listener_, serve_health, kSelfCheckTimeout);
}

absl::Status Server::Ready() const {
  HEADSTART_RETURN_IF_ERROR(lifecycle_.Ready());
  if (tls_ == nullptr) return absl::OkStatus();
  const auto serve = [this](int fd) { Serve(*grpc_.acceptor, listener_->fd(), fd); };
  return CheckTlsHandshake(*listener_, serve, kSelfCheckTimeout);
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
      .status = [this] { return StatusJson(Report()); },
      .drain = [this] { Drain(); }};
}

StatusReport Server::Report() const {
  StatusReport report;
  report.now = Instant::Now();
  report.uptime = report.now - started_at_;
  report.model = context_.model_name;
  report.phase = PhaseName(lifecycle_.phase());
  report.state = Snapshot();
  report.totals = metrics_.totals();
  report.prompts = recent_prompts_.Get();
  if (const ServedModel* model = context_.model.load(); model != nullptr) {
    report.facts = FactsOf(*model->engine, absl::ZeroDuration());
    report.requests = model->engine->Requests(StatusReport::kMaxRequests);
  }
  return report;
}

MetricsSnapshot Server::Snapshot() const {
  MetricsSnapshot s;
  s.max_queue_requests = options_.max_queue_requests;
  s.max_queue_tokens = options_.max_queue_tokens;
  if (const ServedModel* model = context_.model.load(); model != nullptr) {
    const Engine& engine = *model->engine;
    s.load = engine.load();
    s.predicted_drain = engine.PredictDrain();
    s.layers_done = engine.layers_done();
    s.pool_blocks = engine.page_pool().num_pages();
    s.pool_free = engine.page_pool().free_pages();
    // Looked at later: by then some may be cached that were used.
    s.pool_cached = std::min(engine.page_pool().cached_pages(), s.pool_free);
    s.pool_acquired = engine.page_pool().acquired();
    s.pool_released = engine.page_pool().released();
    s.pool_evicted = engine.page_pool().evicted();
    s.host_kv_bytes = engine.host_pages().num_chunks() * engine.host_pages().chunk_bytes();
    s.host_kv_free_bytes = engine.host_pages().free_chunks() * engine.host_pages().chunk_bytes();
  }
  if (span_exporter_ != nullptr) {
    s.trace_spans_exported = span_exporter_->exported();
    s.trace_spans_dropped = span_exporter_->dropped();
  }
  const ListenerStats connections = listener_->stats();
  s.connections = connections.open;
  s.connections_accepted = connections.accepted;
  for (size_t i = 0; i < kShedReasonNames.size(); ++i) {
    s.connections_shed.emplace_back(std::string(kShedReasonNames[i]), connections.shed[i]);
  }
  for (size_t i = 0; i < kCutReasonNames.size(); ++i) {
    s.connections_cut.emplace_back(std::string(kCutReasonNames[i]), connections.cut[i]);
  }
  if (tls_ != nullptr) {
    const TlsStats tls = tls_->stats();
    s.certificate_not_after = absl::ToUnixSeconds(tls.not_after);
    if (tls.client_ca_not_after) {
      s.client_ca_not_after = absl::ToUnixSeconds(*tls.client_ca_not_after);
    }
    s.certificates_loaded = tls.loaded;
    s.certificates_rejected = tls.rejected;
  }
  s.ready = lifecycle_.healthy();
  s.draining = lifecycle_.phase() == Lifecycle::Phase::kDraining;
  s.stuck = lifecycle_.stuck();
  s.drain_deadline = drain_deadline_.load();
  return s;
}

// ---- the end

absl::Status Server::Shutdown() {
  const absl::Status failure = lifecycle_.failure();
  const absl::Duration patience = failure.ok() ? options_.drain_timeout : kGoodbye;
  const ServedModel* model = context_.model.load();
  const bool idle = model == nullptr || model->engine->WaitUntilIdle(Instant::Now() + patience);
  const int64_t left = Snapshot().load.inflight_requests;
  context_.cancelling_all.store(true);
  listener_->Stop();
  grpc_.server->Shutdown(Instant::Now() + (idle ? kGoodbye : absl::ZeroDuration()));
  if (!failure.ok() || idle) return failure;
  return absl::DeadlineExceededError(
      absl::StrCat("the drain timeout passed: ", left, " accepted requests were cancelled"));
}

Server::~Server() {
  watch_timer_.reset();
  context_.cancelling_all.store(true);
  admin_.reset();
  if (listener_ != nullptr) listener_->Stop();
  if (grpc_.server != nullptr) grpc_.server->Shutdown(Instant::Now());
  if (loading_thread_.joinable()) loading_thread_.join();
  engine_.reset();  // while there is somebody to tell that the backend was lost
}

}  // namespace headstart
