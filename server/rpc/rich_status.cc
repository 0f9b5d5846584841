#include "server/rpc/rich_status.h"

#include <optional>
#include <string>

#include "absl/strings/ascii.h"
#include "absl/time/time.h"
#include "engine/error.h"
#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"

namespace headstart {
namespace {

constexpr char kDomain[] = "headstart.v1";
// Trailers must fit into a client's header limit with room for the rest.
constexpr size_t kMaxMessageBytes = 1024;

// The field that a message of ours starts with: "token_ids[17]" of "token_ids[17]=9 is not …".
std::string FieldName(absl::string_view message) {
  size_t end = 0;
  while (end < message.size() &&
         (absl::ascii_isalnum(message[end]) || message[end] == '_' || message[end] == '.' ||
          message[end] == '[' || message[end] == ']' || message[end] == '-')) {
    ++end;
  }
  return std::string(message.substr(0, end));
}

void AddDetails(const absl::Status& status, google::rpc::Status* rich) {
  google::rpc::ErrorInfo info;
  info.set_domain(kDomain);
  info.set_reason(std::string(ErrorReasonName(ReasonOf(status))));
  rich->add_details()->PackFrom(info);

  if (ReasonOf(status) == ErrorReason::kInvalidField) {
    google::rpc::BadRequest bad_request;
    auto* violation = bad_request.add_field_violations();
    violation->set_field(FieldName(status.message()));
    violation->set_description(rich->message());
    rich->add_details()->PackFrom(bad_request);
  }
  if (const std::optional<absl::Duration> delay = RetryAfter(status)) {
    google::rpc::RetryInfo retry;
    retry.mutable_retry_delay()->set_seconds(absl::ToInt64Seconds(*delay));
    retry.mutable_retry_delay()->set_nanos(
        static_cast<int32_t>(absl::ToInt64Nanoseconds(*delay % absl::Seconds(1))));
    rich->add_details()->PackFrom(retry);
  }
}

}  // namespace

grpc::Status ToGrpcStatus(const absl::Status& status) {
  if (status.ok()) return grpc::Status::OK;
  google::rpc::Status rich;
  rich.set_code(static_cast<int>(status.code()));
  rich.set_message(std::string(status.message().substr(0, kMaxMessageBytes)));
  AddDetails(status, &rich);
  return grpc::Status(static_cast<grpc::StatusCode>(status.code()), rich.message(),
                      rich.SerializeAsString());
}

}  // namespace headstart
