// The queue of prompts and the one thread that owns the engine. Knows no gRPC.
#pragma once

#include <deque>
#include <functional>
#include <thread>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/prefill_job.h"
#include "engine/ship/kv_sink.h"
#include "kernels/base/mutex.h"
#include "server/rpc/timer.h"

namespace headstart {

// A prompt on its way to the engine. Job and sink must live until `done` has begun.
struct PrefillTask {
  PrefillJob* job = nullptr;
  KvSink* sink = nullptr;
  // On the worker's thread, right before the engine gets the job. Not called for a task that ends
  // in the queue.
  std::function<void()> on_start;
  // Exactly once, on whatever thread ends the task. The worker does not look at the task after it.
  std::function<void(absl::StatusOr<PrefillResult>)> done;
};

// First in, first out. How long the queue gets is Admission's business.
class PrefillWorker {
 public:
  using Run = std::function<absl::StatusOr<PrefillResult>(const PrefillJob& job, KvSink& sink)>;
  // Makes the engine, on the worker's thread. On an error the thread ends.
  using Load = std::function<absl::StatusOr<Run>()>;

  // `timer` must outlive the worker.
  PrefillWorker(Load load, Timer* timer);
  // Stop().
  ~PrefillWorker();
  PrefillWorker(const PrefillWorker&) = delete;
  PrefillWorker& operator=(const PrefillWorker&) = delete;

  // Queues the task. It ends without compute, at once, when its deadline passes or it is cancelled
  // while it waits; at once also when its job is cancelled already or the worker has stopped.
  void Push(PrefillTask task);

  // Ends the job's task if it waits: DEADLINE_EXCEEDED after the job's deadline, else CANCELLED. To
  // be called after job->cancelled was set: a task that is not in the queue yet, or is being
  // computed, ends by that flag. Looks at `job` only as a name.
  void Cancel(const PrefillJob* job);

  // Something is being computed or waits for it.
  bool busy();

  // Ends the waiting tasks with UNAVAILABLE, cancels the running one and waits for it.
  void Stop();

 private:
  struct Entry {
    PrefillTask task;
    Timer::Id expiry = Timer::kNone;
  };

  void Loop(const Load& load);
  // Waits for a task; false when stopped.
  bool Pop(Entry* entry);
  void RunTask(const Run& run, PrefillTask task);

  Timer* const timer_;
  Mutex mutex_;
  CondVar changed_;  // a task came, or stopped
  std::deque<Entry> queue_ ABSL_GUARDED_BY(mutex_);
  PrefillJob* running_ ABSL_GUARDED_BY(mutex_) = nullptr;
  bool stopped_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread thread_;  // last: starts when the rest is ready
};

}  // namespace headstart
