#include "tests/server/server_fixture.h"

#include <grpcpp/generic/generic_stub.h>
#include <httplib.h>

#include <future>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "google/rpc/status.pb.h"
#include "kernels/base/status_macros.h"
#include "server/ops/logging.h"
#include "server/rpc/convert.h"
#include "tests/testing/status_matchers.h"

namespace headstart::testing {
namespace {

constexpr int32_t kVocabSize = 256;
constexpr absl::Duration kCallLimit = absl::Seconds(60);

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

ServerTest::ServerTest() {
  InitLogging(LogFormat::kText, "error");
  options_.model_dir = dir_ / "tiny";
  options_.listen = "127.0.0.1:0";
  options_.admin_listen = "127.0.0.1:0";
  options_.backend.dtype = ComputeDType::kF32;
  options_.backend.num_threads = 1;
  options_.drain_timeout = absl::Seconds(30);
}

void ServerTest::TearDown() {
  if (server_ == nullptr) return;
  // The client may know the end of a cancelled call before the server does.
  const absl::Time limit = absl::Now() + absl::Seconds(10);
  MetricsSnapshot end = server_->Snapshot();
  while (end.load.inflight_requests > 0 && absl::Now() < limit) {
    absl::SleepFor(absl::Milliseconds(5));
    end = server_->Snapshot();
  }
  EXPECT_EQ(end.load.acquired, end.load.released);
  EXPECT_EQ(end.load.inflight_requests, 0);
  EXPECT_EQ(end.load.inflight_tokens, 0);
  EXPECT_EQ(end.load.queued_requests, 0);
  EXPECT_EQ(end.load.queued_tokens, 0);
  EXPECT_EQ(end.pool_acquired, end.pool_released);
  EXPECT_EQ(end.pool_free, end.pool_blocks);
  server_.reset();
}

absl::StatusOr<std::unique_ptr<Engine>> ServerTest::MakeEngine() {
  HEADSTART_RETURN_IF_ERROR(WriteTinyModel(options_.model_dir, model_));
  HEADSTART_ASSIGN_OR_RETURN(auto inner, MakeBackend(options_.backend));
  auto backend = std::make_unique<FaultBackend>(std::move(inner));
  backend_ = backend.get();
  EngineOptions engine;
  engine.model_dir = options_.model_dir;
  engine.chunk_tokens = options_.chunk_tokens;
  engine.kv_pool_tokens = options_.kv_pool_tokens;
  return Engine::Create(engine, std::move(backend), nullptr);
}

void ServerTest::StartLoading(Server::EngineFactory make_engine) {
  auto server = Server::Start(options_, std::move(make_engine));
  ASSERT_OK(server);
  server_ = *std::move(server);
}

void ServerTest::Start() {
  StartLoading([this] { return MakeEngine(); });
  ASSERT_NE(server_, nullptr);
  ASSERT_OK(server_->WaitUntilLoaded());
}

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

ServerTest::HttpAnswer ServerTest::Get(const std::string& path) const {
  const auto answer = httplib::Client("127.0.0.1", server_->admin_port()).Get(path);
  return answer ? HttpAnswer{answer->status, answer->body} : HttpAnswer{};
}

ServerTest::HttpAnswer ServerTest::Post(const std::string& path) const {
  const auto answer = httplib::Client("127.0.0.1", server_->admin_port()).Post(path);
  return answer ? HttpAnswer{answer->status, answer->body} : HttpAnswer{};
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
  while (server_->Snapshot().load.queued_requests != count) absl::SleepFor(absl::Milliseconds(1));
}

absl::Duration ServerTest::WaitUntilIdle() const {
  const absl::Time began = absl::Now();
  while (server_->Snapshot().load.inflight_requests > 0) absl::SleepFor(absl::Milliseconds(1));
  return absl::Now() - began;
}

Barrier::Barrier(FaultBackend* backend, const std::string& op, int32_t layer) {
  backend->SetHook([state = state_, op, layer](const BackendCall& call) {
    if (call.op != op || call.layer != layer) return absl::OkStatus();
    MutexLock lock(&state->mutex);
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
  context_.set_deadline(absl::ToChronoTime(absl::Now() + kCallLimit));
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
