// A PrefillService on a port of its own whose Prefill does what a test says.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <string>

#include "absl/time/time.h"
#include "grpcpp/server.h"
#include "grpcpp/server_context.h"
#include "headstart/v1/prefill.grpc.pb.h"
#include "tests/client/kv_stream.h"

namespace headstart::testing {

using PrefillWriter = grpc::ServerWriter<v1::PrefillResponse>;

class FakeServer final : private v1::PrefillService::Service {
 public:
  // `call` counts from 1. Runs on a thread of the server.
  using Handler =
      std::function<grpc::Status(int call, grpc::ServerContext& context, PrefillWriter& writer)>;

  explicit FakeServer(Handler handler);
  ~FakeServer() override;

  std::string target() const { return "127.0.0.1:" + std::to_string(port_); }
  int num_calls() const { return num_calls_; }
  v1::PrefillRequest last_request() const { return last_request_; }  // when no call runs
  // What grpc.health.v1 says of the service.
  void SetServing(bool serving);

 private:
  grpc::Status Prefill(grpc::ServerContext* context, const v1::PrefillRequest* request,
                       PrefillWriter* writer) override;
  // A model with a vocabulary of 1000 tokens.
  grpc::Status GetModelInfo(grpc::ServerContext* context, const v1::GetModelInfoRequest* request,
                            v1::GetModelInfoResponse* response) override;
  grpc::Status GetServerInfo(grpc::ServerContext* context, const v1::GetServerInfoRequest* request,
                             v1::GetServerInfoResponse* response) override;

  const Handler handler_;
  std::atomic<int> num_calls_{0};
  v1::PrefillRequest last_request_;
  int port_ = 0;
  std::unique_ptr<grpc::Server> server_;
};

// Writes the first `count` messages; -1 all.
void WriteStream(const KvStream& stream, PrefillWriter& writer, int count = -1);

// A status as Headstart's server makes them.
grpc::Status RichStatus(grpc::StatusCode code, const std::string& reason,
                        absl::Duration retry_delay = absl::InfiniteDuration());

}  // namespace headstart::testing
