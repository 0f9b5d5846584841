// The admin port: its routes, the Unix socket, and probes beside clients that misbehave.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <memory>
#include <string>
#include <vector>

#include "tests/server/raw_http2.h"
#include "tests/server/server_fixture.h"
#include "tests/testing/status_matchers.h"

namespace headstart::testing {
namespace {

using ::testing::HasSubstr;

class AdminPortTest : public ServerTest {
 protected:
  AdminPortTest() { options_.admin_socket = dir_ / "admin"; }

  HttpReply OnSocket(const std::string& method, const std::string& path) const {
    return Exchange(options_.admin_socket, HttpHead(method, path));
  }
  HttpReply OnPort(const std::string& method, const std::string& path,
                   const std::string& more = "") const {
    return Exchange(server_->admin_port(), HttpHead(method, path, more));
  }
};

TEST_F(AdminPortTest, AnswersProbesAndVersion) {
  Start();
  EXPECT_EQ(Get("/healthz").status, 200);
  EXPECT_EQ(Get("/readyz").status, 200);
  EXPECT_THAT(Get("/version").body, HasSubstr("\"model\":\"tiny\""));
  EXPECT_EQ(Get("/other").status, 404);
  const HttpReply head = OnPort("HEAD", "/metrics");
  EXPECT_EQ(head.status, 200);
  EXPECT_EQ(head.body, "");
  EXPECT_GT(std::stoi(head.Header("Content-Length")), 1000);
}

TEST_F(AdminPortTest, DrainsWhenAskedThroughTheSocket) {
  Start();
  EXPECT_EQ(OnSocket("GET", "/readyz").status, 200);
  EXPECT_EQ(OnSocket("GET", "/drain").status, 405);
  EXPECT_EQ(Get("/readyz").status, 200);
  EXPECT_EQ(OnSocket("POST", "/drain").status, 202);
  EXPECT_EQ(Run(Prompt(5)).reason(), "DRAINING");
  server_->WaitForEnd();
  EXPECT_OK(server_->Shutdown());
}

// From this machine: as a form of a web page, a script, or a sidecar that forwards would ask.
TEST_F(AdminPortTest, DoesNotDrainWhenAskedThroughThePort) {
  Start();
  for (const char* more : {"", "Origin: http://evil.example\r\n", "Content-Length: 0\r\n",
                           "X-Forwarded-For: 10.0.0.7\r\n"}) {
    EXPECT_EQ(OnPort("POST", "/drain", more).status, 403) << more;
  }
  EXPECT_EQ(Get("/readyz").status, 200);
}

TEST_F(AdminPortTest, SocketIsForThisUserAndGoesWithTheServer) {
  Start();
  struct stat info = {};
  ASSERT_EQ(stat(options_.admin_socket.c_str(), &info), 0);
  EXPECT_EQ(info.st_mode, static_cast<mode_t>(S_IFSOCK | S_IRUSR | S_IWUSR));
  server_.reset();
  EXPECT_NE(stat(options_.admin_socket.c_str(), &info), 0);
}

TEST_F(AdminPortTest, ReplacesASocketOnlyWhenNobodyListensOnIt) {
  {
    auto left = ListenOnPath(options_.admin_socket);
    ASSERT_OK(left);
    EXPECT_THAT(ListenOnPath(options_.admin_socket),
                StatusIs(absl::StatusCode::kUnavailable, HasSubstr(options_.admin_socket)));
  }
  EXPECT_OK(ListenOnPath(options_.admin_socket));
  const std::string file = dir_ / "file";
  ASSERT_OK(WriteFile(file, "not to be lost"));
  EXPECT_THAT(ListenOnPath(file), StatusIs(absl::StatusCode::kUnavailable));
  EXPECT_THAT(ListenOnPath(std::string(200, 'x')), StatusIs(absl::StatusCode::kUnavailable));
}

TEST_F(AdminPortTest, ProbesAnswerBesideSlowClientsAndManyScrapers) {
  Start();
  std::vector<std::unique_ptr<RawHttp2>> clients;
  for (int i = 0; i < 8; ++i) {
    clients.push_back(std::make_unique<RawHttp2>(server_->admin_port()));
    clients.back()->Send("GET /metrics HTTP/1.1\r\nHost:");
  }
  for (int i = 0; i < 40; ++i) {
    clients.push_back(std::make_unique<RawHttp2>(server_->admin_port()));
    clients.back()->Send(HttpHead("GET", "/metrics", "Connection: keep-alive\r\n"));
  }
  EXPECT_EQ(Get("/healthz").status, 200);
  EXPECT_EQ(Get("/readyz").status, 200);
}

// Each would take a descriptor that connections of gRPC need.
TEST_F(AdminPortTest, IdleClientsAreFew) {
  Start();
  const double before = Metric("process_open_fds");
  std::vector<std::unique_ptr<RawHttp2>> idle;
  for (int i = 0; i < 200; ++i) idle.push_back(std::make_unique<RawHttp2>(server_->admin_port()));
  // The clients' ends are in this process as well.
  EXPECT_LE(Metric("process_open_fds"), before + 200 + HttpServer::kMaxConnections);
  EXPECT_TRUE(idle.front()->IsClosedWithin(absl::Seconds(10)));
}

}  // namespace
}  // namespace headstart::testing
