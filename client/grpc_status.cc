#include "client/grpc_status.h"

#include <algorithm>

#include "absl/strings/cord.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"

namespace headstart {
namespace {

constexpr absl::string_view kTypePrefix = "type.googleapis.com/";

// The detail of type T, when there is one that can be read.
template <typename T>
std::optional<T> DetailOf(const absl::Status& status) {
  const auto payload = status.GetPayload(absl::StrCat(kTypePrefix, T::descriptor()->full_name()));
  T detail;
  if (!payload || !detail.ParseFromString(std::string(*payload))) return std::nullopt;
  return detail;
}

}  // namespace

absl::Status ToAbslStatus(const grpc::Status& status) {
  if (status.ok()) return absl::OkStatus();
  absl::Status result(static_cast<absl::StatusCode>(status.error_code()), status.error_message());
  google::rpc::Status rich;
  if (!rich.ParseFromString(status.error_details())) return result;
  for (const auto& detail : rich.details())
    result.SetPayload(detail.type_url(), absl::Cord(detail.value()));
  return result;
}

google::rpc::Status ToRpcStatus(const absl::Status& status) {
  google::rpc::Status result;
  result.set_code(status.raw_code());
  result.set_message(std::string(status.message()));
  status.ForEachPayload([&result](absl::string_view type_url, const absl::Cord& value) {
    google::protobuf::Any* detail = result.add_details();
    detail->set_type_url(std::string(type_url));
    detail->set_value(std::string(value));
  });
  return result;
}

std::optional<google::rpc::ErrorInfo> ErrorInfoOf(const absl::Status& status) {
  auto info = DetailOf<google::rpc::ErrorInfo>(status);
  if (info && info->domain() != "headstart.v1") info.reset();
  return info;
}

std::string ErrorReasonOf(const absl::Status& status) {
  const auto info = ErrorInfoOf(status);
  return info ? info->reason() : "";
}

std::optional<absl::Duration> RetryDelayOf(const absl::Status& status) {
  const auto info = DetailOf<google::rpc::RetryInfo>(status);
  if (!info) return std::nullopt;
  return std::max(absl::ZeroDuration(), absl::Seconds(info->retry_delay().seconds()) +
                                            absl::Nanoseconds(info->retry_delay().nanos()));
}

std::string DescribeStatus(const absl::Status& status) {
  std::string text = absl::StatusCodeToString(status.code());
  if (const std::string reason = ErrorReasonOf(status); !reason.empty())
    absl::StrAppend(&text, " (", reason, ")");
  absl::StrAppend(&text, ": ", status.message());
  if (const auto bad = DetailOf<google::rpc::BadRequest>(status)) {
    for (const auto& violation : bad->field_violations()) {
      absl::StrAppend(&text, "; ", violation.field(), ": ", violation.description());
    }
  }
  if (const auto delay = RetryDelayOf(status))
    absl::StrAppend(&text, "; retry in ", absl::FormatDuration(*delay));
  return absl::Utf8SafeCEscape(text);
}

}  // namespace headstart
