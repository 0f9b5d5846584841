// The last prompts and what became of them, for the status page.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/time/time.h"
#include "engine/error.h"
#include "kernels/base/instant.h"
#include "kernels/base/mutex.h"
#include "server/rpc/call_record.h"

namespace headstart {

struct RecentPrompt {
  int64_t number = 0;  // since the start, from 1
  std::string request_id;
  absl::StatusCode code = absl::StatusCode::kOk;
  ErrorReason reason = ErrorReason::kNone;
  int64_t num_tokens = 0;
  int64_t cached_tokens = 0;
  bool detached = false;
  Instant ended_at;
  absl::Duration total;              // accepted until ended
  std::optional<TimeShares> shares;  // of those that ended OK; add up to `total`
  double density = 1;
  // Of those that ended OK; see PrefillResult.
  std::vector<float> layer_density;
  std::vector<float> layer_head_budget;

  // Some head's budget was estimated.
  bool is_sparse() const;
};

// Thread-safe.
class RecentPrompts {
 public:
  static constexpr size_t kCapacity = 100;

  // A Prefill call ended. Those that were never accepted are left out.
  void Add(const CallRecord& record, const absl::Status& status);
  // Oldest first, kCapacity at most.
  std::vector<std::shared_ptr<const RecentPrompt>> Get() const;

 private:
  mutable Mutex mutex_;
  int64_t count_ ABSL_GUARDED_BY(mutex_) = 0;
  std::deque<std::shared_ptr<const RecentPrompt>> prompts_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace headstart
