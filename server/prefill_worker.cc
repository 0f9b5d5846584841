#include "server/prefill_worker.h"

#include <algorithm>
#include <utility>

#include "absl/time/clock.h"
#include "server/error.h"

namespace headstart {
namespace {

absl::Status StoppedError() {
  return MakeError(absl::StatusCode::kUnavailable, ErrorReason::kDraining,
                   "the server stopped before the prompt was computed");
}

// What a waiting job that was given up ends with.
absl::Status GivenUpError(const PrefillJob& job) {
  if (absl::Now() >= job.deadline) {
    return MakeError(absl::StatusCode::kDeadlineExceeded, ErrorReason::kDeadlineExceeded,
                     "the deadline passed in the queue");
  }
  return MakeError(absl::StatusCode::kCancelled, ErrorReason::kClientCancelled,
                   "cancelled in the queue");
}

}  // namespace

PrefillWorker::PrefillWorker(Load load, Timer* timer)
    : timer_(timer), thread_([this, load = std::move(load)] { Loop(load); }) {}

PrefillWorker::~PrefillWorker() { Stop(); }

void PrefillWorker::Push(PrefillTask task) {
  PrefillJob* const job = task.job;
  absl::Status refused;
  {
    MutexLock lock(&mutex_);
    if (stopped_) {
      refused = StoppedError();
    } else if (job->cancelled.load()) {
      refused = GivenUpError(*job);
    } else {
      const Timer::Id expiry = timer_->Schedule(job->deadline, [this, job] { Cancel(job); });
      queue_.push_back({std::move(task), expiry});
      changed_.Signal();
      return;
    }
  }
  task.done(refused);
}

void PrefillWorker::Cancel(const PrefillJob* job) {
  Entry entry;
  {
    MutexLock lock(&mutex_);
    auto found = std::find_if(queue_.begin(), queue_.end(),
                              [job](const Entry& e) { return e.task.job == job; });
    if (found == queue_.end()) return;
    entry = std::move(*found);
    queue_.erase(found);
  }
  timer_->Cancel(entry.expiry);  // before `done`, which lets the job go
  entry.task.done(GivenUpError(*entry.task.job));
}

bool PrefillWorker::busy() {
  MutexLock lock(&mutex_);
  return running_ != nullptr || !queue_.empty();
}

void PrefillWorker::Stop() {
  std::deque<Entry> waiting;
  {
    MutexLock lock(&mutex_);
    stopped_ = true;
    changed_.Signal();
    waiting.swap(queue_);
    if (running_ != nullptr) running_->cancelled.store(true);
  }
  for (Entry& entry : waiting) {
    timer_->Cancel(entry.expiry);
    entry.task.done(StoppedError());
  }
  if (thread_.joinable()) thread_.join();
}

void PrefillWorker::Loop(const Load& load) {
  const absl::StatusOr<Run> run = load();
  if (!run.ok()) return;
  Entry entry;
  while (Pop(&entry)) {
    timer_->Cancel(entry.expiry);
    RunTask(*run, std::move(entry.task));
  }
}

bool PrefillWorker::Pop(Entry* entry) {
  MutexLock lock(&mutex_);
  while (!stopped_ && queue_.empty()) changed_.Wait(&mutex_);
  if (stopped_) return false;
  *entry = std::move(queue_.front());
  queue_.pop_front();
  running_ = entry->task.job;
  return true;
}

void PrefillWorker::RunTask(const Run& run, PrefillTask task) {
  task.on_start();
  absl::StatusOr<PrefillResult> result = run(*task.job, *task.sink);
  {
    MutexLock lock(&mutex_);
    running_ = nullptr;
  }
  task.done(std::move(result));
}

}  // namespace headstart
