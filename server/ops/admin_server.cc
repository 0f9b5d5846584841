#include "server/ops/admin_server.h"

#include <unistd.h>

#include <limits>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"
#include "server/ops/status_report.h"

namespace headstart {
namespace {

constexpr char kPrometheusText[] = "text/plain; version=0.0.4; charset=utf-8";

HttpAnswer Plain(const absl::Status& status) {
  if (status.ok()) return {200, "ok\n"};
  return {503, absl::StrCat(status.message(), "\n")};
}

// The page may use nothing but itself and this server, and nobody may frame it.
HttpAnswer ForBrowser(std::string body, const char* type) {
  return {200,
          std::move(body),
          type,
          {{"Content-Security-Policy",
            "default-src 'self' 'unsafe-inline'; img-src data:; frame-ancestors 'none'"},
           {"X-Content-Type-Options", "nosniff"},
           {"Cache-Control", "no-store"}}};
}

std::vector<HttpRoute> MakeRoutes(const AdminHandlers& handlers) {
  const auto metrics = [h = handlers.metrics] { return HttpAnswer{200, h(), kPrometheusText}; };
  const auto live = [h = handlers.live] { return Plain(h()); };
  const auto ready = [h = handlers.ready] { return Plain(h()); };
  const auto version = [h = handlers.version] { return HttpAnswer{200, h(), "application/json"}; };
  const auto page = [] { return ForBrowser(StatusPage(), "text/html; charset=utf-8"); };
  const auto status = [h = handlers.status] { return ForBrowser(h(), "application/json"); };
  const auto drain = [h = handlers.drain] {
    h();
    return HttpAnswer{202, "draining\n"};
  };
  return {{.method = "GET", .path = "/metrics", .answer = metrics, .slow = true},
          {.method = "GET", .path = "/healthz", .answer = live, .slow = true},
          {.method = "GET", .path = "/readyz", .answer = ready, .slow = true},
          {.method = "GET", .path = "/version", .answer = version},
          {.method = "GET", .path = "/", .answer = page},
          {.method = "GET", .path = "/status.json", .answer = status, .slow = true},
          {.method = "POST", .path = "/drain", .answer = drain, .only_local = true}};
}

// The HTTP server closes old connections for new ones.
ListenerLimits NoLimits() {
  constexpr int64_t kAny = std::numeric_limits<int64_t>::max();
  return {kAny, kAny};
}

}  // namespace

AdminServer::AdminServer(const AdminHandlers& handlers) : http_(MakeRoutes(handlers)) {}

absl::Status AdminServer::Listen(const HostPort& address, const std::string& socket_path) {
  HEADSTART_ASSIGN_OR_RETURN(network_, Listener::Create(address, NoLimits()));
  if (socket_path.empty()) return absl::OkStatus();
  std::vector<Descriptor> sockets(1);
  HEADSTART_ASSIGN_OR_RETURN(sockets[0], ListenOnPath(socket_path));
  socket_path_ = socket_path;
  HEADSTART_ASSIGN_OR_RETURN(local_, Listener::Create(std::move(sockets), NoLimits()));
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<AdminServer>> AdminServer::Start(const HostPort& address,
                                                                const std::string& socket_path,
                                                                const AdminHandlers& handlers) {
  std::unique_ptr<AdminServer> server(new AdminServer(handlers));
  HEADSTART_RETURN_IF_ERROR(server->Listen(address, socket_path));
  HttpServer& http = server->http_;
  server->network_->Start([&http](int fd) { http.Serve(fd, /*local=*/false); });
  if (server->local_ != nullptr) {
    server->local_->Start([&http](int fd) { http.Serve(fd, /*local=*/true); });
  }
  return server;
}

AdminServer::~AdminServer() {
  if (network_ != nullptr) network_->Stop();
  if (local_ != nullptr) local_->Stop();
  if (!socket_path_.empty()) unlink(socket_path_.c_str());
}

}  // namespace headstart
