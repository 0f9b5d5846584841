// Runs functions at given times, on one thread of its own.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <thread>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "kernels/base/instant.h"
#include "kernels/base/mutex.h"

namespace headstart {

// Thread-safe. The functions run one after the other, so they must be short and never wait. (One
// that logs waits for whoever reads standard error, and the others with it.)
class Timer {
 public:
  using Id = uint64_t;
  static constexpr Id kNone = 0;  // never given out

  Timer();
  // What has not run by then never does.
  ~Timer();
  Timer(const Timer&) = delete;
  Timer& operator=(const Timer&) = delete;

  // Runs `fn` once, at `when` or soon after. Never with Instant::InfiniteFuture().
  Id Schedule(Instant when, std::function<void()> fn);

  // When this returns, the function has returned or will never run: what it uses may go. Called on
  // the timer's own thread it does not wait for the function that is running there.
  void Cancel(Id id);

 private:
  void Loop();
  // Runs what is due; returns when the next one is.
  Instant RunDue() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  Mutex mutex_;
  std::map<std::pair<Instant, Id>, std::function<void()>> entries_ ABSL_GUARDED_BY(mutex_);
  std::map<Id, Instant> times_ ABSL_GUARDED_BY(mutex_);
  Id last_id_ ABSL_GUARDED_BY(mutex_) = kNone;
  Id running_ ABSL_GUARDED_BY(mutex_) = kNone;
  bool stopped_ ABSL_GUARDED_BY(mutex_) = false;
  CondVar changed_;     // an earlier entry, or stopped
  CondVar finished_;    // a function returned
  std::thread thread_;  // last: starts when the rest is ready
};

}  // namespace headstart
