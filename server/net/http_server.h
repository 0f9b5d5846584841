// HTTP/1.1 for a handful of routes that take no body: for operators and probes, who must get their
// answer whatever other clients do.
#pragma once

#include <chrono>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace headstart {

struct HttpAnswer {
  int status = 200;
  std::string body;
  std::string type = "text/plain; charset=utf-8";
  std::vector<std::pair<std::string, std::string>> headers = {};
};

struct HttpRoute {
  std::string method;  // GET answers HEAD, too
  std::string path;
  std::function<HttpAnswer()> answer;
  // It may take its time: it runs on a thread of the route's own, one at a time, and one answer is
  // for all who asked before it was begun. The others run on the thread that serves everybody.
  bool slow = false;
  bool only_local = false;  // 403 for connections that are not `local`
};

// All connections on one thread, which never waits for a client. A connection is for one request,
// and has `request_time` from its begin to the end of the answer (408). The head may have 8 KiB
// (431); a request with a body gets 413. Of more connections than kMaxConnections the oldest is
// closed.
class HttpServer {
 public:
  static constexpr int kMaxConnections = 32;

  explicit HttpServer(std::vector<HttpRoute> routes,
                      std::chrono::milliseconds request_time = std::chrono::seconds(10));
  // Waits for answers that are being made, and a second at most until they are sent.
  ~HttpServer();
  HttpServer(const HttpServer&) = delete;
  HttpServer& operator=(const HttpServer&) = delete;

  // Takes a connected stream socket. `local`: for routes that are not for everybody. Thread-safe.
  void Serve(int fd, bool local);

 private:
  class State;
  class Session;
  const std::unique_ptr<State> state_;
};

}  // namespace headstart
