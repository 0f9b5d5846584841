#include "server/program/exit_code.h"

#include "engine/error.h"

namespace headstart {

int ExitCodeOf(const absl::Status& status) {
  if (IsUsageError(status)) return kExitUsage;
  switch (status.code()) {
    case absl::StatusCode::kOk:
      return kExitOk;
    case absl::StatusCode::kInvalidArgument:
    case absl::StatusCode::kNotFound:
    case absl::StatusCode::kDataLoss:
    case absl::StatusCode::kPermissionDenied:
    case absl::StatusCode::kResourceExhausted:
      return kExitModel;
    case absl::StatusCode::kInternal:
      return kExitBackend;
    default:
      return kExitRuntime;
  }
}

}  // namespace headstart
