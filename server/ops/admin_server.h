// HTTP for operators: the status page, /metrics, /healthz, /readyz, /version, and POST /drain from
// this machine.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "server/net/socket.h"

namespace headstart {

// Called on the admin server's threads, several at once.
struct AdminHandlers {
  std::function<std::string()> metrics;
  std::function<absl::Status()> live;    // OK: 200, else 503 with the message
  std::function<absl::Status()> ready;   // likewise
  std::function<std::string()> version;  // JSON
  std::function<std::string()> status;   // JSON, what the page at / shows
  std::function<void()> drain;           // begins to drain; does not wait
};

class AdminServer {
 public:
  // UNAVAILABLE when the port is taken; names it.
  static absl::StatusOr<std::unique_ptr<AdminServer>> Start(const HostPort& address,
                                                            AdminHandlers handlers);
  // Waits for requests that are being answered.
  ~AdminServer();

  int port() const;

 private:
  struct State;
  explicit AdminServer(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace headstart
