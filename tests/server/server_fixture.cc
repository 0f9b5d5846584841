#include "tests/server/server_fixture.h"

#include <grpcpp/generic/generic_stub.h>

#include <future>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "google/rpc/status.pb.h"
#include "kernels/base/instant.h"
#include "proto/grpc_time.h"
#include "server/ops/logging.h"
#include "server/rpc/chunk_frame.h"
#include "tests/testing/status_matchers.h"

namespace headstart::testing {
namespace {

constexpr int32_t kVocabSize = 256;

// The first detail of type T; an empty one when there is none.
template <typename T>
bool FindDetail(const grpc::Status& status, T* detail) {
  google::rpc::Status rich;
  if (!rich.ParseFromString(status.error_details())) return false;
  for (const auto& any : rich.details()) {
    if (any.UnpackTo(detail)) return true;
  }
  return false;
}

CallResult Collect(grpc::ClientContext& context, grpc::ClientReader<v1::PrefillResponse>& reader) {
  CallResult result;
  v1::PrefillResponse response;
  while (reader.Read(&response)) result.responses.push_back(response);
  result.status = reader.Finish();
  const auto& metadata = context.GetServerInitialMetadata();
  if (auto id = metadata.find("x-request-id"); id != metadata.end()) {
    result.request_id.assign(id->second.data(), id->second.size());
  }
  return result;
}

}  // namespace

std::string CallResult::reason() const {
  google::rpc::ErrorInfo info;
  return FindDetail(status, &info) && info.domain() == "headstart.v1" ? info.reason() : "";
}

std::string CallResult::field() const {
  google::rpc::BadRequest bad;
  return FindDetail(status, &bad) ? bad.field_violations(0).field() : "";
}

bool CallResult::has_retry_delay() const {
  google::rpc::RetryInfo retry;
  return FindDetail(status, &retry);
}

v1::PrefillRequest Prompt(int64_t count) {
  v1::PrefillRequest request;
  for (int64_t i = 0; i < count; ++i) {
    request.add_token_ids(static_cast<uint32_t>(i * 31 + i / 7) % kVocabSize);
  }
  return request;
}

v1::Completed CompletedOf(const v1::PrefillResponse& response) {
  v1::Completed completed;
  const std::string& bytes = response.completed().completed();
  if (response.completed().crc32c() == Crc32c(bytes)) completed.ParseFromString(bytes);
  return completed;
}

ServerTest::ServerTest() { InitLogging(LogFormat::kText, "error"); }

void ServerTest::TearDown() {
  if (server_ == nullptr) return;
  // The client may know the end of a cancelled call before the server does.
  EXPECT_TRUE(BecomesIdle(absl::Seconds(10))) << WhatIsLeft();
  server_.reset();
}

void ServerTest::Start() { ASSERT_OK(StartServing()); }

std::shared_ptr<grpc::Channel> ServerTest::NewChannel(
    const grpc::ChannelArguments& arguments) const {
  grpc::ChannelArguments own = arguments;
  own.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);  // a connection of its own
  own.SetMaxReceiveMessageSize(16 << 20);
  return grpc::CreateCustomChannel(target(), grpc::InsecureChannelCredentials(), own);
}

std::unique_ptr<v1::PrefillService::Stub> ServerTest::NewStub() const {
  return v1::PrefillService::NewStub(NewChannel());
}

std::unique_ptr<v1::PrefillService::Stub> ServerTest::NewSlowStub() const {
  grpc::ChannelArguments arguments;
  arguments.SetInt(GRPC_ARG_HTTP2_BDP_PROBE, 0);
  arguments.SetInt(GRPC_ARG_HTTP2_STREAM_LOOKAHEAD_BYTES, 64 << 10);
  return v1::PrefillService::NewStub(NewChannel(arguments));
}

CallResult ServerTest::Run(const v1::PrefillRequest& request,
                           const std::function<void(grpc::ClientContext&)>& prepare) const {
  const auto stub = NewStub();
  return OpenCall(stub.get(), request, prepare).Finish();
}

std::string ServerTest::Health(const std::string& service) const {
  // HealthCheckRequest{service = 1}, by hand: Debian ships no health.proto.
  std::string request;
  if (!service.empty()) {
    request = absl::StrCat("\x0a", std::string(1, static_cast<char>(service.size())), service);
  }
  const grpc::Slice slice(request);
  const grpc::ByteBuffer bytes(&slice, 1);
  grpc::ByteBuffer response;
  grpc::GenericStub stub(NewChannel());
  grpc::ClientContext context;
  std::promise<grpc::Status> done;
  stub.UnaryCall(&context, "/grpc.health.v1.Health/Check", grpc::StubOptions(), &bytes, &response,
                 [&done](grpc::Status status) { done.set_value(std::move(status)); });
  const grpc::Status status = done.get_future().get();
  if (!status.ok()) return absl::StrCat("error ", status.error_code());
  grpc::Slice answer;
  EXPECT_TRUE(response.TrySingleSlice(&answer).ok());
  const std::string text(reinterpret_cast<const char*>(answer.begin()), answer.size());
  if (text == "\x08\x01") return "SERVING";
  return text == "\x08\x02" ? "NOT_SERVING" : "unknown";
}

HttpReply ServerTest::Get(const std::string& path) const {
  return Exchange(server_->admin_port(), HttpHead("GET", path));
}

double ServerTest::Metric(const std::string& series) const {
  for (absl::string_view line : absl::StrSplit(Get("/metrics").body, '\n')) {
    double value = 0;
    if (absl::StartsWith(line, series + " ") &&
        absl::SimpleAtod(line.substr(series.size() + 1), &value)) {
      return value;
    }
  }
  return -1;
}

double ServerTest::Requests(const std::string& code, const std::string& reason) const {
  return Metric(absl::StrCat("headstart_requests_total{code=\"", code,
                             "\",model=\"tiny\",reason=\"", reason, "\"}"));
}

void ServerTest::WaitForQueued(int64_t count) const {
  EXPECT_TRUE(ComesTrue([&] { return server_->Snapshot().load.queued_requests == count; }));
}

Barrier::Barrier(FaultBackend* backend, const std::string& op, int32_t layer, int32_t passes) {
  {
    MutexLock lock(&state_->mutex);
    state_->passes = passes;
  }
  backend->SetHook([state = state_, op, layer](const BackendCall& call) {
    if (call.op != op || call.layer != layer) return absl::OkStatus();
    MutexLock lock(&state->mutex);
    if (--state->passes >= 0) return absl::OkStatus();
    state->reached = true;
    state->changed.SignalAll();
    while (!state->open) state->changed.Wait(&state->mutex);
    return absl::OkStatus();
  });
}

Barrier::~Barrier() { Open(); }

void Barrier::WaitUntilReached() {
  MutexLock lock(&state_->mutex);
  while (!state_->reached) state_->changed.Wait(&state_->mutex);
}

void Barrier::Open() {
  MutexLock lock(&state_->mutex);
  state_->open = true;
  state_->changed.SignalAll();
}

OpenCall::OpenCall(v1::PrefillService::Stub* stub, const v1::PrefillRequest& request,
                   const std::function<void(grpc::ClientContext&)>& prepare) {
  context_.set_deadline(Instant::Now() + kCallLimit);
  if (prepare) prepare(context_);
  reader_ = stub->Prefill(&context_, request);
}

v1::PrefillResponse OpenCall::Read() {
  v1::PrefillResponse response;
  HEADSTART_CHECK(reader_->Read(&response));
  return response;
}

CallResult OpenCall::Finish() { return Collect(context_, *reader_); }

}  // namespace headstart::testing
