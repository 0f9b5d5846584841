// HTTP for operators: the status page, /metrics, /healthz, /readyz, /version; and POST /drain,
// through a Unix socket only.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "server/net/http_server.h"
#include "server/net/listener.h"

namespace headstart {

// Called on the admin server's threads, several at once, but none twice at once.
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
  // `socket_path`: a Unix socket for processes of this user, where POST /drain is answered as well;
  // a web page can't reach it, nor a proxy that takes what comes over the network for local. Empty:
  // none. UNAVAILABLE when the port or the path is taken; names it.
  static absl::StatusOr<std::unique_ptr<AdminServer>> Start(const HostPort& address,
                                                            const std::string& socket_path,
                                                            const AdminHandlers& handlers);
  // Waits for requests that are being answered.
  ~AdminServer();

  int port() const { return network_->port(); }

 private:
  explicit AdminServer(const AdminHandlers& handlers);
  absl::Status Listen(const HostPort& address, const std::string& socket_path);

  HttpServer http_;
  std::unique_ptr<Listener> network_;
  std::unique_ptr<Listener> local_;  // null: none
  std::string socket_path_;
};

}  // namespace headstart
