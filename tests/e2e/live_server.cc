#include "tests/e2e/live_server.h"

#include <utility>

#include "kernels/base/status_macros.h"
#include "tests/testing/kv_collector.h"

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
  const ServerOptions own = live->options_;
  live->model_ = options.model;
  live->options_ = options.server;
  live->options_.model_dir = own.model_dir;
  live->options_.listen = own.listen;
  live->options_.admin_listen = "";
  live->options_.backend = own.backend;
  HEADSTART_RETURN_IF_ERROR(live->StartServing());
  return live;
}

PrefillClientOptions LiveServer::client_options() const {
  PrefillClientOptions options;
  options.target = target();
  options.timeout = absl::Seconds(30);
  options.retry.max_attempts = 1;
  options.connections = 1;
  // The server is there; but under load gRPC 1.51 sometimes takes a connection that is under way
  // for a failed one ("ipv4:...: No such file or directory"). Then a call waits for the next.
  options.wait_for_ready = true;
  return options;
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

absl::StatusOr<Computed> Compute(Engine& engine, const PrefillRequest& request) {
  KvCollector collector;
  Computed computed;
  HEADSTART_ASSIGN_OR_RETURN(computed.result, collector.Run(engine, request));
  const HeadShape& heads = engine.config().heads;
  const int64_t row_bytes = heads.head_dim * DTypeBytes(engine.geometry().dtype);
  for (int32_t layer = 0; layer < engine.config().num_layers; ++layer) {
    for (const std::vector<std::byte>& plane :
         {collector.Keys(layer, heads.num_kv_heads, row_bytes),
          collector.Values(layer, heads.num_kv_heads, row_bytes)}) {
      computed.kv.insert(computed.kv.end(), plane.begin(), plane.end());
    }
  }
  return computed;
}

}  // namespace headstart::testing
