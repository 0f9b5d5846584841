// A real server in this process, over a tiny model and on free ports, with a backend in which tests
// can meddle: what every test of the server and of the whole product stands on.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "engine/engine.h"
#include "server/server.h"
#include "tests/testing/fault_backend.h"
#include "tests/testing/temp_dir.h"
#include "tests/testing/tiny_model.h"

namespace headstart::testing {

class TestServer {
 public:
  // Free ports on loopback, one small model ("tiny"), one thread, KV in f32: 1 KiB a token.
  TestServer();

  // Makes the model and starts the server over it with what model_ and options_ say now; returns
  // when requests are taken.
  absl::Status StartServing();
  // Does not wait for the model. `make_engine`: in place of MakeEngine.
  absl::Status StartLoading(Server::EngineFactory make_engine);
  // The server's; sets backend_.
  absl::StatusOr<std::unique_ptr<Engine>> MakeEngine();
  // Another one of the same model with the same arithmetic.
  absl::StatusOr<std::unique_ptr<Engine>> MakeLocalEngine() const;

  Server& server() const { return *server_; }
  FaultBackend& backend() const { return *backend_; }
  std::string target() const { return "127.0.0.1:" + std::to_string(server_->port()); }
  const std::string& model_dir() const { return options_.model_dir; }
  int32_t num_layers() const { return model_.num_layers; }

  // Every request has ended, and all that requests held has come back (device pages, host memory,
  // leases, tickets): within `limit`.
  bool BecomesIdle(absl::Duration limit) const;
  // What of that does not hold now; empty when all does.
  std::string WhatIsLeft() const;

 protected:
  TempDir dir_;
  TinyModelOptions model_;
  ServerOptions options_;
  FaultBackend* backend_ = nullptr;  // the engine's, once loaded
  std::unique_ptr<Server> server_;
};

// Asks again and again; false when it did not come true within `limit`.
bool ComesTrue(const std::function<bool()>& condition, absl::Duration limit = absl::Seconds(20));

}  // namespace headstart::testing
