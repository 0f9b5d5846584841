#include "server/ops/otlp_sink.h"

#include <grpcpp/create_channel.h>
#include <grpcpp/security/credentials.h>

#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "kernels/base/instant.h"
#include "kernels/base/status_macros.h"
#include "opentelemetry/proto/collector/trace/v1/trace_service.grpc.pb.h"
#include "proto/grpc_time.h"
#include "server/net/socket.h"

namespace headstart {
namespace {

using opentelemetry::proto::collector::trace::v1::ExportTraceServiceResponse;
using opentelemetry::proto::collector::trace::v1::TraceService;

class OtlpSink final : public SpanSink {
 public:
  explicit OtlpSink(const OtlpEndpoint& endpoint)
      : stub_(TraceService::NewStub(grpc::CreateChannel(
            endpoint.address, endpoint.tls ? grpc::SslCredentials(grpc::SslCredentialsOptions())
                                           : grpc::InsecureChannelCredentials()))) {}

  absl::StatusOr<int64_t> Send(const TraceExport& spans, Instant deadline) override {
    grpc::ClientContext context;
    context.set_deadline(deadline);
    if (!Begin(&context)) return absl::CancelledError("the exporter ends");
    ExportTraceServiceResponse response;
    const grpc::Status status = stub_->Export(&context, spans, &response);
    Begin(nullptr);
    if (!status.ok()) {
      return absl::Status(static_cast<absl::StatusCode>(status.error_code()),
                          status.error_message());
    }
    return response.partial_success().rejected_spans();
  }

  void Cancel() override {
    MutexLock lock(&mutex_);
    cancelled_ = true;
    if (running_ != nullptr) running_->TryCancel();
  }

 private:
  // Makes this the call that Cancel ends; null: none. False when it should not begin.
  bool Begin(grpc::ClientContext* context) {
    MutexLock lock(&mutex_);
    running_ = cancelled_ ? nullptr : context;
    return !cancelled_;
  }

  const std::unique_ptr<TraceService::Stub> stub_;
  Mutex mutex_;
  bool cancelled_ ABSL_GUARDED_BY(mutex_) = false;
  grpc::ClientContext* running_ ABSL_GUARDED_BY(mutex_) = nullptr;
};

}  // namespace

absl::StatusOr<OtlpEndpoint> ParseOtlpEndpoint(const std::string& text) {
  absl::string_view rest = text;
  OtlpEndpoint endpoint;
  endpoint.tls = absl::ConsumePrefix(&rest, "https://");
  if (!endpoint.tls) absl::ConsumePrefix(&rest, "http://");
  endpoint.address = std::string(rest);
  HEADSTART_ASSIGN_OR_RETURN(const HostPort address, ParseHostPort(endpoint.address));
  if (address.host.empty() || address.port == 0) {
    return absl::InvalidArgumentError(absl::StrCat(text, " names no host or no port"));
  }
  return endpoint;
}

std::unique_ptr<SpanSink> MakeOtlpSink(const OtlpEndpoint& endpoint) {
  return std::make_unique<OtlpSink>(endpoint);
}

}  // namespace headstart
