// A real server in this process, over a tiny model and on a free port, with a backend in which
// tests can meddle.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "client/prefill_client.h"
#include "engine/engine.h"
#include "headstart/v1/prefill.pb.h"
#include "server/server.h"
#include "tests/testing/fault_backend.h"
#include "tests/testing/temp_dir.h"
#include "tests/testing/tiny_model.h"

namespace headstart::testing {

// Six layers, and room for long prompts.
TinyModelOptions SmallModel();
// 1 MiB of KV for every 128 tokens: a long prompt has more of it than all buffers between engine
// and client hold.
TinyModelOptions LargeKvModel();

struct LiveServerOptions {
  TinyModelOptions model = SmallModel();
  ServerOptions server;  // but for the model, the ports and the backend
};

class LiveServer {
 public:
  // Returns when requests are taken.
  static absl::StatusOr<std::unique_ptr<LiveServer>> Start(const LiveServerOptions& options);

  Server& server() { return *server_; }
  FaultBackend& backend() { return *backend_; }
  std::string target() const { return "127.0.0.1:" + std::to_string(server_->port()); }
  const std::string& model_dir() const { return dir_.path(); }
  int32_t num_layers() const { return num_layers_; }

  // One try, 30 s, and this server.
  PrefillClientOptions client_options() const;
  // Of the same model with the same arithmetic, for what the server's engine should have done.
  absl::StatusOr<std::unique_ptr<Engine>> MakeLocalEngine() const;

  // Nothing waits, nothing runs, every KV page came back: within `limit`.
  bool BecomesIdle(absl::Duration limit);

 private:
  TempDir dir_;
  int32_t num_layers_ = 0;
  EngineOptions engine_options_;
  FaultBackend* backend_ = nullptr;  // the engine's
  std::unique_ptr<Server> server_;
};

// `count` ids, different for different seeds.
std::vector<uint32_t> SomePrompt(int64_t count, uint32_t seed = 1);
v1::PrefillRequest RequestOf(const std::vector<uint32_t>& ids,
                             v1::AttentionPreset preset = v1::ATTENTION_PRESET_EXACT);

// KV as [layer][K, V][kv_heads][num_tokens][head_dim], and what else came.
struct Received {
  std::vector<std::byte> kv;
  PrefillOutcome outcome;
};
absl::StatusOr<Received> Receive(const PrefillClientOptions& client,
                                 const v1::PrefillRequest& request, KvReceiverOptions receive = {},
                                 CancelToken* cancel = nullptr);

// What an engine makes of a job, in the form of Received.
struct Computed {
  std::vector<std::byte> kv;
  PrefillResult result;
};
absl::StatusOr<Computed> Compute(Engine& engine, const PrefillJob& job);

// Asks again and again; false when it did not come true within `limit`.
bool ComesTrue(const std::function<bool()>& condition, absl::Duration limit = absl::Seconds(20));

}  // namespace headstart::testing
