// A server in this process over a tiny model, and calls to it without a client library: what gRPC
// itself sees.
#pragma once

#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "google/rpc/error_details.pb.h"
#include "headstart/v1/prefill.grpc.pb.h"
#include "tests/server/http_client.h"
#include "tests/testing/test_server.h"

namespace headstart::testing {

// No call of a test takes longer.
inline constexpr absl::Duration kCallLimit = absl::Seconds(60);

// How a call ended.
struct CallResult {
  grpc::Status status;
  std::vector<v1::PrefillResponse> responses;
  std::string request_id;  // initial metadata x-request-id

  std::string reason() const;  // of ErrorInfo; empty without one
  std::string field() const;   // of the first BadRequest violation
  bool has_retry_delay() const;
};

// Prompt of `count` ids that every tiny model knows.
v1::PrefillRequest Prompt(int64_t count);

// The completion of a stream that has one at its end, whose checksum is right; else an empty one.
v1::Completed CompletedOf(const v1::PrefillResponse& response);

class ServerTest : public ::testing::Test, protected TestServer {
 protected:
  ServerTest();
  // What was accepted has ended, and everything came back.
  void TearDown() override;

  // Starts the server with `options_` and waits until it serves.
  void Start();

  std::unique_ptr<v1::PrefillService::Stub> NewStub() const;
  std::shared_ptr<grpc::Channel> NewChannel(
      const grpc::ChannelArguments& arguments = grpc::ChannelArguments()) const;

  // Of a client that takes little at a time, so that the server feels soon that nobody reads.
  std::unique_ptr<v1::PrefillService::Stub> NewSlowStub() const;

  // Runs a prompt to its end. `prepare` may change the context before.
  CallResult Run(const v1::PrefillRequest& request,
                 const std::function<void(grpc::ClientContext&)>& prepare = nullptr) const;

  // grpc.health.v1.Health/Check of the service; what it says, or the error as text.
  std::string Health(const std::string& service = "") const;

  // GET on the admin server.
  HttpReply Get(const std::string& path) const;
  // The value of a line of /metrics, given all before the blank; -1 when there is none.
  double Metric(const std::string& series) const;

  // headstart_requests_total of this ending.
  double Requests(const std::string& code, const std::string& reason) const;

  // Until the server has so many requests in its queue.
  void WaitForQueued(int64_t count) const;
};

// Holds the engine at an operation of a layer until it is told to go on. The first `passes` times
// it does not.
class Barrier {
 public:
  Barrier(FaultBackend* backend, const std::string& op, int32_t layer, int32_t passes = 0);
  // Lets the engine go, now and later.
  ~Barrier();

  void WaitUntilReached();
  void Open();

 private:
  struct State {
    Mutex mutex;
    CondVar changed;
    int32_t passes ABSL_GUARDED_BY(mutex) = 0;
    bool reached ABSL_GUARDED_BY(mutex) = false;
    bool open ABSL_GUARDED_BY(mutex) = false;
  };

  const std::shared_ptr<State> state_ = std::make_shared<State>();  // also the engine's, while held
};

// A call that is under way, read message by message.
class OpenCall {
 public:
  OpenCall(v1::PrefillService::Stub* stub, const v1::PrefillRequest& request,
           const std::function<void(grpc::ClientContext&)>& prepare = nullptr);

  // The next message; a CHECK fails when there is none.
  v1::PrefillResponse Read();
  grpc::ClientContext& context() { return context_; }
  // Reads what is left.
  CallResult Finish();

 private:
  grpc::ClientContext context_;
  std::unique_ptr<grpc::ClientReader<v1::PrefillResponse>> reader_;
};

}  // namespace headstart::testing
