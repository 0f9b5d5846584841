#include "tests/e2e/live_server.h"

#include <utility>

#include "absl/time/clock.h"
#include "kernels/base/status_macros.h"
#include "tests/testing/fake_sink.h"

namespace headstart::testing {

TinyModelOptions SmallModel() {
  TinyModelOptions model;
  model.num_layers = 6;
  model.max_positions = 4096;
  return model;
}

TinyModelOptions LargeKvModel() {
  TinyModelOptions model;
  model.num_layers = 4;
  model.num_kv_heads = 4;
  model.head_dim = 64;
  model.max_positions = 4096;
  return model;
}

absl::StatusOr<std::unique_ptr<LiveServer>> LiveServer::Start(const LiveServerOptions& options) {
  auto live = std::make_unique<LiveServer>();
  HEADSTART_RETURN_IF_ERROR(WriteTinyModel(live->model_dir(), options.model));
  live->num_layers_ = options.model.num_layers;
  ServerOptions server = options.server;
  server.model_dir = live->model_dir();
  server.model_name = "tiny";
  server.listen = "127.0.0.1:0";
  server.admin_listen = "";

  EngineOptions& engine = live->engine_options_;
  engine.model_dir = server.model_dir;
  engine.model_name = server.model_name;
  engine.backend = {.device = "cpu", .dtype = ComputeDType::kF32, .num_threads = 1};
  engine.chunk_tokens = server.chunk_tokens;
  engine.kv_pool_tokens = server.kv_pool_tokens;
  const auto make_engine = [raw = live.get()]() -> absl::StatusOr<std::unique_ptr<Engine>> {
    HEADSTART_ASSIGN_OR_RETURN(auto inner, MakeBackend(raw->engine_options_.backend));
    auto backend = std::make_unique<FaultBackend>(std::move(inner));
    raw->backend_ = backend.get();
    return Engine::Create(raw->engine_options_, std::move(backend), nullptr);
  };
  HEADSTART_ASSIGN_OR_RETURN(live->server_, Server::Start(server, make_engine));
  HEADSTART_RETURN_IF_ERROR(live->server_->WaitUntilLoaded());
  return live;
}

PrefillClientOptions LiveServer::client_options() const {
  PrefillClientOptions options;
  options.target = target();
  options.timeout = absl::Seconds(30);
  options.retry.max_attempts = 1;
  // The server is there; but under load gRPC 1.51 sometimes takes a connection that is under way
  // for a failed one ("ipv4:...: No such file or directory"). Then a call waits for the next.
  options.wait_for_ready = true;
  return options;
}

absl::StatusOr<std::unique_ptr<Engine>> LiveServer::MakeLocalEngine() const {
  return Engine::Create(engine_options_, nullptr);
}

bool LiveServer::BecomesIdle(absl::Duration limit) {
  return ComesTrue(
      [this] {
        const MetricsSnapshot now = server_->Snapshot();
        return now.load.inflight_requests == 0 && now.load.acquired == now.load.released &&
               now.pool_free == now.pool_blocks && now.pool_acquired == now.pool_released;
      },
      limit);
}

std::vector<uint32_t> SomePrompt(int64_t count, uint32_t seed) {
  std::vector<uint32_t> ids;
  uint32_t state = seed;
  for (int64_t i = 0; i < count; ++i) {
    state = state * 1664525u + 1013904223u;  // Numerical Recipes
    ids.push_back((state >> 8) % 256);
  }
  return ids;
}

v1::PrefillRequest RequestOf(const std::vector<uint32_t>& ids, v1::AttentionPreset preset) {
  v1::PrefillRequest request;
  request.mutable_token_ids()->Add(ids.begin(), ids.end());
  request.mutable_attention()->set_preset(preset);
  return request;
}

absl::StatusOr<Received> Receive(const PrefillClientOptions& client,
                                 const v1::PrefillRequest& request, KvReceiverOptions receive,
                                 CancelToken* cancel) {
  Received received;
  receive.on_manifest = [&received](const v1::KvManifest&, const KvShape& shape) {
    received.kv.assign(shape.total_bytes(), std::byte{0});
    return ContiguousKv(shape, absl::MakeSpan(received.kv));
  };
  HEADSTART_ASSIGN_OR_RETURN(const auto connection, PrefillClient::Create(client));
  HEADSTART_ASSIGN_OR_RETURN(received.outcome,
                             connection->Prefill(request, std::move(receive), cancel));
  return received;
}

absl::StatusOr<Computed> Compute(Engine& engine, const PrefillJob& job) {
  FakeSink sink;
  Computed computed;
  HEADSTART_ASSIGN_OR_RETURN(computed.result, engine.RunPrefill(job, sink));
  const HeadShape& heads = engine.config().heads;
  const int64_t row_bytes = heads.head_dim * DTypeBytes(engine.kv_dtype());
  for (int32_t layer = 0; layer < engine.config().num_layers; ++layer) {
    for (const std::vector<std::byte>& plane :
         {sink.Keys(layer, heads.num_kv_heads, row_bytes),
          sink.Values(layer, heads.num_kv_heads, row_bytes)}) {
      computed.kv.insert(computed.kv.end(), plane.begin(), plane.end());
    }
  }
  return computed;
}

bool ComesTrue(const std::function<bool()>& condition, absl::Duration limit) {
  const absl::Time end = absl::Now() + limit;
  while (!condition()) {
    if (absl::Now() > end) return false;
    absl::SleepFor(absl::Milliseconds(1));
  }
  return true;
}

}  // namespace headstart::testing
