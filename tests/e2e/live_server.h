// A server in this process and a client of it, and what both should have made of a prompt.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "client/prefill_client.h"
#include "engine/engine.h"
#include "headstart/v1/prefill.pb.h"
#include "tests/testing/test_server.h"

namespace headstart::testing {

// Six layers, and room for long prompts.
TinyModelOptions SmallModel();
// 1 MiB of KV for every 128 tokens: a long prompt has more of it than the buffers between engine
// and client hold.
TinyModelOptions LargeKvModel();

struct LiveServerOptions {
  TinyModelOptions model = SmallModel();
  ServerOptions server;  // but for the model, the ports and the backend
};

class LiveServer : public TestServer {
 public:
  // Returns when requests are taken.
  static absl::StatusOr<std::unique_ptr<LiveServer>> Start(const LiveServerOptions& options);

  // One try, one connection, 30 s, and this server.
  PrefillClientOptions client_options() const;
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

// What an engine makes of a request, in the form of Received.
struct Computed {
  std::vector<std::byte> kv;
  PrefillResult result;
};
absl::StatusOr<Computed> Compute(Engine& engine, const PrefillRequest& request);

}  // namespace headstart::testing
