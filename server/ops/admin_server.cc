#include "server/ops/admin_server.h"

#include <httplib.h>

#include <cerrno>
#include <system_error>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "server/ops/status_report.h"

namespace headstart {
namespace {

constexpr int kThreads = 8;
constexpr time_t kClientTimeoutSeconds = 2;
constexpr size_t kMaxRequestBodyBytes = 1024;
constexpr char kText[] = "text/plain; charset=utf-8";
constexpr char kPrometheusText[] = "text/plain; version=0.0.4; charset=utf-8";

void AnswerStatus(const absl::Status& status, httplib::Response& response) {
  response.status = status.ok() ? 200 : 503;
  response.set_content(status.ok() ? "ok\n" : absl::StrCat(status.message(), "\n"), kText);
}

// The page may use nothing but itself and this server, and nobody may frame it.
void AnswerToBrowser(const std::string& body, const char* type, httplib::Response& response) {
  response.set_header("Content-Security-Policy",
                      "default-src 'self' 'unsafe-inline'; img-src data:; frame-ancestors 'none'");
  response.set_header("X-Content-Type-Options", "nosniff");
  response.set_header("Cache-Control", "no-store");
  response.set_content(body, type);
}

bool IsFromThisMachine(const httplib::Request& request) {
  absl::string_view address = request.remote_addr;
  absl::ConsumePrefix(&address, "::ffff:");  // IPv4 through an IPv6 socket
  return IsLoopback(std::string(address));
}

void SetRoutes(httplib::Server& http, const AdminHandlers& handlers) {
  using httplib::Request;
  using httplib::Response;
  http.Get("/metrics", [&handlers](const Request&, Response& response) {
    response.set_content(handlers.metrics(), kPrometheusText);
  });
  http.Get("/healthz", [&handlers](const Request&, Response& response) {
    AnswerStatus(handlers.live(), response);
  });
  http.Get("/readyz", [&handlers](const Request&, Response& response) {
    AnswerStatus(handlers.ready(), response);
  });
  http.Get("/version", [&handlers](const Request&, Response& response) {
    response.set_content(handlers.version(), "application/json");
  });
  http.Get("/", [](const Request&, Response& response) {
    AnswerToBrowser(StatusPage(), "text/html; charset=utf-8", response);
  });
  http.Get("/status.json", [&handlers](const Request&, Response& response) {
    AnswerToBrowser(handlers.status(), "application/json", response);
  });
  http.Post("/drain", [&handlers](const Request& request, Response& response) {
    if (!IsFromThisMachine(request)) {
      response.status = 403;
      response.set_content("only from this machine\n", kText);
      return;
    }
    handlers.drain();
    response.status = 202;
    response.set_content("draining\n", kText);
  });
}

void SetLimits(httplib::Server& http) {
  http.new_task_queue = [] { return new httplib::ThreadPool(kThreads); };
  http.set_read_timeout(kClientTimeoutSeconds);
  http.set_write_timeout(kClientTimeoutSeconds);
  // One request a connection: one that idles holds a thread, which probes need more than browsers.
  http.set_keep_alive_timeout(kClientTimeoutSeconds);
  http.set_keep_alive_max_count(1);
  http.set_payload_max_length(kMaxRequestBodyBytes);
  // The library's default also sets SO_REUSEPORT, with which a taken port goes unnoticed.
  http.set_socket_options([](socket_t fd) {
    const int on = 1;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
  });
}

}  // namespace

struct AdminServer::State {
  AdminHandlers handlers;
  httplib::Server http;
  int port = 0;
  std::thread thread;
};

absl::StatusOr<std::unique_ptr<AdminServer>> AdminServer::Start(const HostPort& address,
                                                                AdminHandlers handlers) {
  auto state = std::make_unique<State>();
  state->handlers = std::move(handlers);
  SetRoutes(state->http, state->handlers);
  SetLimits(state->http);
  errno = 0;
  if (address.port == 0) {
    state->port = state->http.bind_to_any_port(address.host);
  } else {
    state->port = state->http.bind_to_port(address.host, address.port) ? address.port : -1;
  }
  if (state->port < 0) {
    return absl::UnavailableError(absl::StrCat(
        "can't listen on ", address.host, ":", address.port,
        " (admin): ", errno != 0 ? std::generic_category().message(errno) : "unknown host"));
  }
  httplib::Server* http = &state->http;
  state->thread = std::thread([http] { http->listen_after_bind(); });
  while (!http->is_running()) std::this_thread::yield();  // before that, stop() would do nothing
  return std::unique_ptr<AdminServer>(new AdminServer(std::move(state)));
}

AdminServer::AdminServer(std::unique_ptr<State> state) : state_(std::move(state)) {}

AdminServer::~AdminServer() {
  state_->http.stop();
  state_->thread.join();
}

int AdminServer::port() const { return state_->port; }

}  // namespace headstart
