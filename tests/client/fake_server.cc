#include "tests/client/fake_server.h"

#include <utility>

#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"
#include "grpcpp/health_check_service_interface.h"
#include "grpcpp/security/server_credentials.h"
#include "grpcpp/server_builder.h"
#include "proto/grpc_time.h"

namespace headstart::testing {

FakeServer::FakeServer(Handler handler, FetchHandler fetch_handler)
    : handler_(std::move(handler)), fetch_handler_(std::move(fetch_handler)) {
  grpc::EnableDefaultHealthCheckService(true);
  grpc::ServerBuilder builder;
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
  builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port_);
  builder.RegisterService(this);
  server_ = builder.BuildAndStart();
  SetServing(true);
}

FakeServer::~FakeServer() { server_->Shutdown(Instant::Now()); }

void FakeServer::SetServing(bool serving) {
  server_->GetHealthCheckService()->SetServingStatus("headstart.v1.PrefillService", serving);
}

grpc::Status FakeServer::Prefill(grpc::ServerContext* context, const v1::PrefillRequest* request,
                                 PrefillWriter* writer) {
  int call;
  {
    absl::MutexLock lock(&mutex_);
    requests_.push_back(*request);
    call = static_cast<int>(requests_.size());
  }
  return handler_(call, *context, *writer);
}

grpc::Status FakeServer::FetchKv(grpc::ServerContext* context, FetchReaderWriter* stream) {
  v1::FetchKvRequest request;
  if (!stream->Read(&request) || !request.has_fetch())
    return RichStatus(grpc::StatusCode::INVALID_ARGUMENT, "MALFORMED_REQUEST");
  {
    absl::MutexLock lock(&mutex_);
    fetches_.push_back(request.fetch());
    fetch_peers_.push_back(context->peer());
  }
  return fetch_handler_(request.fetch(), *stream);
}

grpc::Status FakeServer::RenewLease(grpc::ServerContext*, const v1::RenewLeaseRequest* request,
                                    v1::RenewLeaseResponse* response) {
  absl::MutexLock lock(&mutex_);
  renewed_.push_back(request->fetch_id());
  response->mutable_lease()->set_seconds(7);
  response->mutable_lease()->set_nanos(500'000'000);
  return grpc::Status::OK;
}

grpc::Status FakeServer::ReleaseKv(grpc::ServerContext*, const v1::ReleaseKvRequest* request,
                                   v1::ReleaseKvResponse*) {
  absl::MutexLock lock(&mutex_);
  released_.push_back(request->fetch_id());
  return grpc::Status::OK;
}

int FakeServer::num_calls() const {
  absl::MutexLock lock(&mutex_);
  return static_cast<int>(requests_.size());
}

v1::PrefillRequest FakeServer::request(int call) const {
  absl::MutexLock lock(&mutex_);
  return requests_.at(call - 1);
}

std::vector<v1::KvFetch> FakeServer::fetches() const {
  absl::MutexLock lock(&mutex_);
  return fetches_;
}

std::vector<std::string> FakeServer::fetch_peers() const {
  absl::MutexLock lock(&mutex_);
  return fetch_peers_;
}

std::vector<std::string> FakeServer::renewed() const {
  absl::MutexLock lock(&mutex_);
  return renewed_;
}

std::vector<std::string> FakeServer::released() const {
  absl::MutexLock lock(&mutex_);
  return released_;
}

grpc::Status FakeServer::GetModelInfo(grpc::ServerContext*, const v1::GetModelInfoRequest*,
                                      v1::GetModelInfoResponse* response) {
  ++num_model_infos_;
  response->set_kv_bytes_per_token(kv_bytes_per_token_);
  response->set_model("tiny");
  response->set_vocab_size(1000);
  return grpc::Status::OK;
}

grpc::Status FakeServer::GetServerInfo(grpc::ServerContext*, const v1::GetServerInfoRequest*,
                                       v1::GetServerInfoResponse* response) {
  response->set_backend("fake");
  return grpc::Status::OK;
}

grpc::Status FakeServer::Estimate(grpc::ServerContext*, const v1::EstimateRequest* request,
                                  v1::EstimateResponse* response) {
  absl::MutexLock lock(&mutex_);
  last_estimate_ = *request;
  *response = estimate_;
  return grpc::Status::OK;
}

grpc::Status FakeServer::GetLoads(grpc::ServerContext*, const v1::GetLoadsRequest*,
                                  v1::GetLoadsResponse* response) {
  absl::MutexLock lock(&mutex_);
  *response = loads_;
  return grpc::Status::OK;
}

v1::EstimateRequest FakeServer::last_estimate() const {
  absl::MutexLock lock(&mutex_);
  return last_estimate_;
}

void FakeServer::Answer(const v1::EstimateResponse& estimate) {
  absl::MutexLock lock(&mutex_);
  estimate_ = estimate;
}

void FakeServer::Answer(const v1::GetLoadsResponse& loads) {
  absl::MutexLock lock(&mutex_);
  loads_ = loads;
}

void WriteStream(const KvStream& stream, PrefillWriter& writer, int count) {
  for (const v1::PrefillResponse& response : stream) {
    if (count-- == 0 || !writer.Write(response)) return;
  }
}

void WriteFetch(const KvStream& stream, const v1::KvFetch& fetch, FetchReaderWriter& writer,
                int count) {
  for (const v1::PrefillResponse& response : stream) {
    if (response.has_chunk() && response.chunk().index() < fetch.from_chunk()) continue;
    if (!response.has_manifest() && count-- == 0) return;
    if (!writer.Write(response)) return;
  }
}

std::vector<uint32_t> ReadAcks(FetchReaderWriter& stream) {
  std::vector<uint32_t> acks;
  v1::FetchKvRequest request;
  while (stream.Read(&request)) acks.push_back(request.ack().num_chunks());
  return acks;
}

grpc::Status RichStatus(grpc::StatusCode code, const std::string& reason,
                        absl::Duration retry_delay) {
  google::rpc::Status rich;
  rich.set_code(code);
  google::rpc::ErrorInfo info;
  info.set_domain("headstart.v1");
  info.set_reason(reason);
  rich.add_details()->PackFrom(info);
  if (retry_delay != absl::InfiniteDuration()) {
    google::rpc::RetryInfo retry;
    retry.mutable_retry_delay()->set_seconds(absl::ToInt64Seconds(retry_delay));
    retry.mutable_retry_delay()->set_nanos(
        absl::ToInt64Nanoseconds(retry_delay % absl::Seconds(1)));
    rich.add_details()->PackFrom(retry);
  }
  return grpc::Status(code, "server says no", rich.SerializeAsString());
}

}  // namespace headstart::testing
