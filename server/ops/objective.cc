#include "server/ops/objective.h"

namespace headstart {

absl::Duration Objective::For(int64_t tokens) const {
  return base + per_1k_tokens * (static_cast<double>(tokens) / 1024);
}

Judgement Judge(const CallRecord& record, const absl::Status& status, const Objective& objective) {
  if (record.request_id.empty()) return Judgement::kNotCounted;  // no request that makes sense
  const Instant began = record.accepted ? record.accepted_at : record.came_at;
  const bool in_time = record.ended_at - began <= objective.For(record.num_tokens);
  switch (status.code()) {
    case absl::StatusCode::kInvalidArgument:
    case absl::StatusCode::kNotFound:
    case absl::StatusCode::kPermissionDenied:
    case absl::StatusCode::kAlreadyExists:
    case absl::StatusCode::kFailedPrecondition:
      return Judgement::kNotCounted;
    case absl::StatusCode::kCancelled:
    case absl::StatusCode::kAborted:  // its KV was released
      return in_time ? Judgement::kNotCounted : Judgement::kMissed;
    default:
      return status.ok() && in_time ? Judgement::kMet : Judgement::kMissed;
  }
}

}  // namespace headstart
