// A PrefillService on a port of its own whose streams do what a test says.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "grpcpp/server.h"
#include "grpcpp/server_context.h"
#include "headstart/v1/prefill.grpc.pb.h"
#include "tests/client/kv_stream.h"

namespace headstart::testing {

using PrefillWriter = grpc::ServerWriter<v1::PrefillResponse>;
using FetchReaderWriter = grpc::ServerReaderWriter<v1::PrefillResponse, v1::FetchKvRequest>;

class FakeServer final : private v1::PrefillService::Service {
 public:
  // `call` counts from 1. Runs on a thread of the server.
  using Handler =
      std::function<grpc::Status(int call, grpc::ServerContext& context, PrefillWriter& writer)>;
  // Gets the first message of a call of FetchKv.
  using FetchHandler =
      std::function<grpc::Status(const v1::KvFetch& fetch, FetchReaderWriter& stream)>;

  explicit FakeServer(Handler handler, FetchHandler fetch_handler = nullptr);
  ~FakeServer() override;

  std::string target() const { return "127.0.0.1:" + std::to_string(port_); }
  int num_calls() const;
  // Of a call of Prefill, counted from 1.
  v1::PrefillRequest request(int call) const;
  v1::PrefillRequest last_request() const { return request(num_calls()); }
  // First messages of all calls of FetchKv, in the order of their arrival.
  std::vector<v1::KvFetch> fetches() const;
  // Peers of all calls of FetchKv: one for every connection.
  std::vector<std::string> fetch_peers() const;
  std::vector<std::string> renewed() const;   // fetch_ids
  std::vector<std::string> released() const;  // fetch_ids
  int num_model_infos() const { return num_model_infos_; }
  // What GetModelInfo says from now on.
  void set_kv_bytes_per_token(uint64_t bytes) { kv_bytes_per_token_ = bytes; }
  v1::EstimateRequest last_estimate() const;
  // What Estimate and GetLoads say from now on.
  void Answer(const v1::EstimateResponse& estimate);
  void Answer(const v1::GetLoadsResponse& loads);
  // What grpc.health.v1 says of the service.
  void SetServing(bool serving);

 private:
  grpc::Status Prefill(grpc::ServerContext* context, const v1::PrefillRequest* request,
                       PrefillWriter* writer) override;
  grpc::Status FetchKv(grpc::ServerContext* context, FetchReaderWriter* stream) override;
  // A lease of 7.5 s.
  grpc::Status RenewLease(grpc::ServerContext* context, const v1::RenewLeaseRequest* request,
                          v1::RenewLeaseResponse* response) override;
  grpc::Status ReleaseKv(grpc::ServerContext* context, const v1::ReleaseKvRequest* request,
                         v1::ReleaseKvResponse* response) override;
  // A model with a vocabulary of 1000 tokens.
  grpc::Status GetModelInfo(grpc::ServerContext* context, const v1::GetModelInfoRequest* request,
                            v1::GetModelInfoResponse* response) override;
  grpc::Status GetServerInfo(grpc::ServerContext* context, const v1::GetServerInfoRequest* request,
                             v1::GetServerInfoResponse* response) override;
  grpc::Status Estimate(grpc::ServerContext* context, const v1::EstimateRequest* request,
                        v1::EstimateResponse* response) override;
  grpc::Status GetLoads(grpc::ServerContext* context, const v1::GetLoadsRequest* request,
                        v1::GetLoadsResponse* response) override;

  const Handler handler_;
  const FetchHandler fetch_handler_;
  std::atomic<int> num_model_infos_{0};
  std::atomic<uint64_t> kv_bytes_per_token_{0};
  mutable absl::Mutex mutex_;
  std::vector<v1::PrefillRequest> requests_ ABSL_GUARDED_BY(mutex_);
  v1::EstimateRequest last_estimate_ ABSL_GUARDED_BY(mutex_);
  v1::EstimateResponse estimate_ ABSL_GUARDED_BY(mutex_);
  v1::GetLoadsResponse loads_ ABSL_GUARDED_BY(mutex_);
  std::vector<v1::KvFetch> fetches_ ABSL_GUARDED_BY(mutex_);
  std::vector<std::string> fetch_peers_ ABSL_GUARDED_BY(mutex_);
  std::vector<std::string> renewed_ ABSL_GUARDED_BY(mutex_);
  std::vector<std::string> released_ ABSL_GUARDED_BY(mutex_);
  int port_ = 0;
  std::unique_ptr<grpc::Server> server_;
};

// Writes the first `count` messages; -1 all.
void WriteStream(const KvStream& stream, PrefillWriter& writer, int count = -1);

// Writes what a fetch asks for of the stream of its part: the manifest, the chunks from from_chunk
// on, the completion; at most `count` chunks, and then no completion; -1 all.
void WriteFetch(const KvStream& stream, const v1::KvFetch& fetch, FetchReaderWriter& writer,
                int count = -1);

// What the client acknowledges until it closes its side.
std::vector<uint32_t> ReadAcks(FetchReaderWriter& stream);

// A status as Headstart's server makes them.
grpc::Status RichStatus(grpc::StatusCode code, const std::string& reason,
                        absl::Duration retry_delay = absl::InfiniteDuration());

}  // namespace headstart::testing
