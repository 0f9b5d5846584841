// The error for NaN and infinity in what a model computed. It has the code INTERNAL and a mark,
// because a server treats it otherwise than every other INTERNAL: the request is lost, the backend
// is not.
#pragma once

#include "absl/status/status.h"
#include "absl/strings/cord.h"
#include "absl/strings/string_view.h"

namespace headstart {

inline constexpr absl::string_view kNonFiniteMark = "headstart/nonfinite";

inline absl::Status NonFiniteError(absl::string_view message) {
  absl::Status status = absl::InternalError(message);
  status.SetPayload(kNonFiniteMark, absl::Cord());
  return status;
}

inline bool IsNonFiniteError(const absl::Status& status) {
  return status.GetPayload(kNonFiniteMark).has_value();
}

}  // namespace headstart
