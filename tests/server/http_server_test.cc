// What the HTTP server does with clients of all kinds.
#include "server/net/http_server.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tests/server/http_client.h"
#include "tests/testing/notification.h"

namespace headstart::testing {
namespace {

using ::testing::HasSubstr;

class HttpServerTest : public ::testing::Test {
 protected:
  HttpServerTest() { Start(std::chrono::seconds(60)); }

  void Start(std::chrono::milliseconds request_time) {
    const auto plain = [] { return HttpAnswer{200, "plain\n"}; };
    const auto slow = [this] {
      if (++slow_calls_ == 1) {
        slow_began_.Notify();
        slow_may_end_.WaitForNotification();
      }
      return HttpAnswer{200, "slow\n"};
    };
    server_ = std::make_unique<HttpServer>(
        std::vector<HttpRoute>{
            {.method = "GET", .path = "/plain", .answer = plain},
            {.method = "POST", .path = "/plain", .answer = plain},
            {.method = "GET", .path = "/slow", .answer = slow, .slow = true},
            {.method = "GET", .path = "/local", .answer = plain, .only_local = true}},
        request_time);
  }

  // A connection's end for the client.
  int Connect(bool local = false) {
    int ends[2];
    EXPECT_EQ(socketpair(AF_UNIX, SOCK_STREAM, 0, ends), 0);
    server_->Serve(ends[0], local);
    return ends[1];
  }
  HttpReply Ask(const std::string& request, bool local = false) {
    return ExchangeOn(Connect(local), request);
  }
  HttpReply Get(const std::string& path, const std::string& more = "") {
    return Ask(HttpHead("GET", path, more));
  }

  static bool IsClosed(int fd) {
    pollfd waiting = {fd, POLLIN, 0};
    char byte;
    return poll(&waiting, 1, 10000) == 1 && read(fd, &byte, 1) <= 0;
  }

  std::atomic<int> slow_calls_{0};
  Notification slow_began_, slow_may_end_;
  std::unique_ptr<HttpServer> server_;
};

TEST_F(HttpServerTest, AnswersByMethodAndPath) {
  EXPECT_EQ(Get("/plain").body, "plain\n");
  EXPECT_EQ(Get("/plain?x=y").body, "plain\n");
  EXPECT_EQ(Get("/nothing").status, 404);
  EXPECT_EQ(Get("/plain/").status, 404);
  EXPECT_EQ(Get("/../plain").status, 404);
  const HttpReply wrong = Ask(HttpHead("DELETE", "/plain"));
  EXPECT_EQ(wrong.status, 405);
  EXPECT_EQ(wrong.Header("Allow"), "GET, HEAD, POST");
  const HttpReply head = Ask(HttpHead("HEAD", "/plain"));
  EXPECT_EQ(head.status, 200);
  EXPECT_EQ(head.Header("Content-Length"), "6");
  EXPECT_EQ(head.body, "");
}

TEST_F(HttpServerTest, KeepsLocalRoutesFromOthers) {
  EXPECT_EQ(Get("/local").status, 403);
  EXPECT_EQ(Ask(HttpHead("GET", "/local"), /*local=*/true).status, 200);
}

TEST_F(HttpServerTest, TakesNoBodies) {
  for (const char* path : {"/plain", "/nothing"}) {
    for (const char* more :
         {"Content-Length: 5\r\n", "Content-Length: 99999999999\r\n",
          "Transfer-Encoding: chunked\r\n", "Content-Encoding: br\r\nContent-Length: 203\r\n"}) {
      const std::string request = HttpHead("POST", path, more) + "hello";
      EXPECT_EQ(Ask(request).status, 413) << request;
    }
    EXPECT_NE(Ask(HttpHead("POST", path, "Content-Length: 0\r\n")).status, 413);
  }
}

TEST_F(HttpServerTest, LimitsTheHead) {
  EXPECT_EQ(Get("/plain", absl::StrCat("X: ", std::string(7000, 'a'), "\r\n")).status, 200);
  EXPECT_EQ(Get("/plain", absl::StrCat("X: ", std::string(9000, 'a'), "\r\n")).status, 431);
  std::string many;
  for (int i = 0; i < 2000; ++i) absl::StrAppend(&many, "X", i, ": 1\r\n");
  EXPECT_EQ(Get("/plain", many).status, 431);
  EXPECT_EQ(Ask("GET /plain HTTP/1.1\r\nX: " + std::string(50000, 'a')).status, 431);  // no end
}

TEST_F(HttpServerTest, IgnoresRanges) {
  std::string ranges = "Range: bytes=0-";
  for (int i = 0; i < 1000; ++i) absl::StrAppend(&ranges, ",0-");
  const HttpReply reply = Get("/plain", ranges + "\r\n");
  EXPECT_EQ(reply.status, 200);
  EXPECT_EQ(reply.body, "plain\n");
}

TEST_F(HttpServerTest, RefusesWhatIsNoHttp) {
  for (const char* request :
       {"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        "GET\r\n\r\n", "GET /plain HTTP/1.1\r\nno colon\r\n\r\n",
        "POST /plain HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nx"}) {
    EXPECT_EQ(Ask(request).status, 400) << request;
  }
}

TEST_F(HttpServerTest, OneRequestAConnection) {
  const std::string request = HttpHead("GET", "/plain", "Connection: keep-alive\r\n");
  const HttpReply reply = Ask(request + request);
  EXPECT_EQ(reply.Header("Connection"), "close");
  EXPECT_EQ(reply.body, "plain\n");
}

TEST_F(HttpServerTest, LateRequestsAreRefused) {
  Start(std::chrono::milliseconds(50));
  EXPECT_EQ(Ask("GET /plain HTTP/1.1\r\nHost:").status, 408);
  EXPECT_EQ(Ask("").status, 408);
}

TEST_F(HttpServerTest, SlowClientsDoNotKeepOthersOut) {
  std::vector<int> slow;
  for (int i = 0; i < 3 * HttpServer::kMaxConnections; ++i) {
    slow.push_back(Connect());
    EXPECT_EQ(write(slow.back(), "GET /pl", 7), 7);
  }
  EXPECT_EQ(Get("/plain").status, 200);
  for (int i = 0; i < 2 * HttpServer::kMaxConnections; ++i) EXPECT_TRUE(IsClosed(slow[i])) << i;
  for (const int fd : slow) close(fd);
}

TEST_F(HttpServerTest, SlowAnswersKeepNobodyWaitingAndAreShared) {
  std::vector<std::thread> clients;
  std::atomic<int> answered{0};
  const auto ask = [this, &answered] { answered += Get("/slow").body == "slow\n" ? 1 : 0; };
  clients.emplace_back(ask);
  slow_began_.WaitForNotification();
  for (int i = 0; i < 20; ++i) clients.emplace_back(ask);
  EXPECT_EQ(Get("/plain").status, 200);
  slow_may_end_.Notify();
  for (std::thread& client : clients) client.join();
  EXPECT_EQ(answered, 21);
  EXPECT_LT(slow_calls_, 21);
}

TEST_F(HttpServerTest, EndsWithClientsThatDoNothing) {
  const int silent = Connect();
  EXPECT_EQ(Get("/plain").status, 200);
  server_.reset();
  EXPECT_TRUE(IsClosed(silent));
  close(silent);
}

}  // namespace
}  // namespace headstart::testing
