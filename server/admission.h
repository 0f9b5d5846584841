// Who may come in: bounds what the server has accepted and not yet ended, in requests and tokens,
// and refuses what can't end in time. Knows no gRPC.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_set.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "kernels/base/mutex.h"

namespace headstart {

// How fast prompts have been computed lately.
class TokenRate {
 public:
  void Add(int64_t tokens, absl::Duration compute);
  // Tokens per second of the fastest of the last runs; none before kMinRuns have ended.
  std::optional<double> Best() const;

  static constexpr int64_t kMinRuns = 3;

 private:
  std::array<double, 16> recent_{};
  int64_t num_runs_ = 0;
};

// Both count from accepted to ended: requests that wait, compute and send.
struct AdmissionLimits {
  int64_t max_requests = 64;
  // A prompt longer than this is taken when nothing else is in.
  int64_t max_tokens = 1 << 20;
};

struct Load {
  int64_t queued_requests = 0;  // accepted, compute has not begun
  int64_t queued_tokens = 0;
  int64_t inflight_requests = 0;  // accepted and not ended, queued ones included
  int64_t inflight_tokens = 0;
  // Tickets handed out and given back since the start; equal when nothing is in flight.
  int64_t acquired = 0;
  int64_t released = 0;
};

class Admission;

// The right of one request to be here; given back with the object, which must not outlive the
// Admission. Not thread-safe.
class Ticket {
 public:
  Ticket() = default;
  Ticket(Ticket&& other) noexcept { *this = std::move(other); }
  Ticket& operator=(Ticket&& other) noexcept;
  ~Ticket();

  // The request leaves the queue: its compute begins.
  void Start();

  // What was queued or running before this request when it came.
  int64_t requests_ahead() const { return requests_ahead_; }
  int64_t tokens_ahead() const { return tokens_ahead_; }

 private:
  friend class Admission;

  Admission* admission_ = nullptr;
  std::string request_id_;
  int64_t num_tokens_ = 0;
  bool queued_ = true;
  int64_t requests_ahead_ = 0;
  int64_t tokens_ahead_ = 0;
};

// Thread-safe.
class Admission {
 public:
  // Closed until Open: `closed` is what everyone gets.
  Admission(const AdmissionLimits& limits, absl::Status closed);

  void Open();
  // From now on everyone is refused with `why`; tickets stay good.
  void Close(absl::Status why);
  // OK when open, else why not.
  absl::Status CheckOpen() const;

  // ALREADY_EXISTS: the id is in flight. RESOURCE_EXHAUSTED: full; says when to come back.
  // DEADLINE_EXCEEDED: past, or out of reach at the fastest rate measured lately even in half the
  // predicted time. Or whatever Close was given.
  absl::StatusOr<Ticket> Admit(const std::string& request_id, int64_t num_tokens,
                               absl::Time deadline);

  // A prompt was computed in this time.
  void AddMeasurement(int64_t num_tokens, absl::Duration compute);

  Load load() const;
  // False when something was still in flight at `deadline`.
  bool WaitUntilIdle(absl::Time deadline) const;

 private:
  friend class Ticket;
  void Start(int64_t num_tokens);
  void Release(const Ticket& ticket);
  absl::Status CheckRoom(int64_t num_tokens) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  absl::Status CheckDeadline(int64_t num_tokens, absl::Time deadline) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  absl::Duration RetryDelay(int64_t num_tokens) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const AdmissionLimits limits_;
  mutable Mutex mutex_;
  mutable CondVar idle_;
  absl::Status closed_ ABSL_GUARDED_BY(mutex_);
  Load load_ ABSL_GUARDED_BY(mutex_);
  TokenRate rate_ ABSL_GUARDED_BY(mutex_);
  absl::flat_hash_set<std::string> request_ids_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace headstart
