#include "server/prefill_worker.h"

#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/time/clock.h"
#include "server/error.h"
#include "tests/testing/notification.h"
#include "tests/testing/status_matchers.h"

namespace headstart {
namespace {

using testing::StatusIs;

// The worker runs no KV through it here.
class NullSink : public KvSink {
 public:
  absl::Status OnStart() override { return absl::OkStatus(); }
  absl::StatusOr<absl::Span<std::byte>> Reserve(const KvChunkInfo&, int64_t) override {
    return absl::Span<std::byte>();
  }
  absl::Status Commit() override { return absl::OkStatus(); }
};

// A request as the server would hold it.
struct Request {
  PrefillJob job;
  testing::Notification started;
  testing::Notification ended;
  absl::StatusOr<PrefillResult> result = absl::UnknownError("not ended");
};

// A worker whose engine computes each job until the test lets it go on or the job is cancelled.
class PrefillWorkerTest : public ::testing::Test {
 protected:
  PrefillWorkerTest()
      : worker_(
            [this] {
              return PrefillWorker::Run(
                  [this](const PrefillJob& job, KvSink&) { return Compute(job); });
            },
            &timer_) {}

  absl::StatusOr<PrefillResult> Compute(const PrefillJob& job) {
    MutexLock lock(&mutex_);
    computed_.push_back(job.request_id);
    while (steps_ == 0 && !job.cancelled) {  // "between layers"
      changed_.WaitUntil(&mutex_, absl::Now() + absl::Milliseconds(1));
    }
    if (job.cancelled) return absl::CancelledError("seen by the engine");
    --steps_;
    return PrefillResult();
  }

  // Lets one job finish.
  void Step() {
    MutexLock lock(&mutex_);
    ++steps_;
    changed_.Signal();
  }

  std::vector<std::string> computed() {
    MutexLock lock(&mutex_);
    return computed_;
  }

  void Push(Request* request, const std::string& id) {
    request->job.request_id = id;
    worker_.Push({.job = &request->job,
                  .sink = &sink_,
                  .on_start = [request] { request->started.Notify(); },
                  .done =
                      [request](absl::StatusOr<PrefillResult> result) {
                        request->result = std::move(result);
                        request->ended.Notify();
                      }});
  }

  Timer timer_;
  NullSink sink_;
  Mutex mutex_;
  CondVar changed_;
  int steps_ ABSL_GUARDED_BY(mutex_) = 0;
  std::vector<std::string> computed_ ABSL_GUARDED_BY(mutex_);
  PrefillWorker worker_;
};

TEST_F(PrefillWorkerTest, ComputesInOrderOfArrival) {
  Request a, b, c;
  Push(&a, "a");
  Push(&b, "b");
  Push(&c, "c");
  for (int i = 0; i < 3; ++i) Step();
  for (Request* request : {&a, &b, &c}) {
    request->ended.WaitForNotification();
    EXPECT_OK(request->result);
    EXPECT_TRUE(request->started.HasBeenNotified());
  }
  EXPECT_EQ(computed(), (std::vector<std::string>{"a", "b", "c"}));
}

TEST_F(PrefillWorkerTest, QueuedJobThatIsCancelledEndsWhileAnotherComputes) {
  Request running, queued;
  Push(&running, "running");
  running.started.WaitForNotification();
  Push(&queued, "queued");
  queued.job.cancelled = true;
  worker_.Cancel(&queued.job);
  EXPECT_TRUE(queued.ended.HasBeenNotified());
  EXPECT_THAT(queued.result, StatusIs(absl::StatusCode::kCancelled));
  EXPECT_FALSE(running.ended.HasBeenNotified());
  Step();
  running.ended.WaitForNotification();
  EXPECT_OK(running.result);
  EXPECT_EQ(computed(), std::vector<std::string>{"running"});
}

TEST_F(PrefillWorkerTest, QueuedJobEndsAtItsDeadlineWhileAnotherComputes) {
  Request running, queued;
  Push(&running, "running");
  running.started.WaitForNotification();
  queued.job.deadline = absl::Now() + absl::Milliseconds(30);
  Push(&queued, "queued");
  queued.ended.WaitForNotification();
  EXPECT_LT(absl::Now() - queued.job.deadline, absl::Seconds(1));
  EXPECT_EQ(ReasonOf(queued.result.status()), ErrorReason::kDeadlineExceeded);
  EXPECT_FALSE(running.ended.HasBeenNotified());
  EXPECT_EQ(computed(), std::vector<std::string>{"running"});
  Step();
  running.ended.WaitForNotification();
}

TEST_F(PrefillWorkerTest, JobCancelledBeforeItCameNeverQueues) {
  Request request;
  request.job.cancelled = true;
  Push(&request, "a");
  EXPECT_TRUE(request.ended.HasBeenNotified());
  EXPECT_THAT(request.result, StatusIs(absl::StatusCode::kCancelled));
  EXPECT_TRUE(computed().empty());
}

TEST_F(PrefillWorkerTest, RunningJobIsCancelledByItsFlag) {
  Request request;
  Push(&request, "a");
  request.started.WaitForNotification();
  request.job.cancelled = true;
  worker_.Cancel(&request.job);  // not in the queue any more: nothing to do
  request.ended.WaitForNotification();
  EXPECT_THAT(request.result,
              StatusIs(absl::StatusCode::kCancelled, ::testing::HasSubstr("seen by the engine")));
}

TEST_F(PrefillWorkerTest, StopEndsWaitingAndRunningJobs) {
  Request running, queued, late;
  Push(&running, "running");
  running.started.WaitForNotification();
  Push(&queued, "queued");
  worker_.Stop();
  EXPECT_TRUE(running.ended.HasBeenNotified());
  EXPECT_THAT(running.result, StatusIs(absl::StatusCode::kCancelled));
  EXPECT_TRUE(queued.ended.HasBeenNotified());
  EXPECT_THAT(queued.result, StatusIs(absl::StatusCode::kUnavailable));
  Push(&late, "late");
  EXPECT_TRUE(late.ended.HasBeenNotified());
  EXPECT_THAT(late.result, StatusIs(absl::StatusCode::kUnavailable));
}

TEST_F(PrefillWorkerTest, EveryTaskEndsOnceWhateverRacesForIt) {
  constexpr int kRequests = 300;
  std::vector<std::unique_ptr<Request>> requests;
  for (int i = 0; i < kRequests; ++i) requests.push_back(std::make_unique<Request>());
  std::thread canceller([&] {
    for (auto& request : requests) {
      request->job.cancelled = true;
      worker_.Cancel(&request->job);
    }
  });
  for (int i = 0; i < kRequests; ++i) {
    requests[i]->job.deadline = absl::Now() + absl::Microseconds(i * 37 % 2000);
    Step();
    Push(requests[i].get(), "r");
  }
  // Notify() twice would abort: a task that ends twice ends the test.
  for (auto& request : requests) request->ended.WaitForNotification();
  canceller.join();
}

TEST(PrefillWorkerLoadTest, FailedLoadLeavesAWorkerThatStops) {
  Timer timer;
  testing::Notification loaded;
  PrefillWorker worker(
      [&]() -> absl::StatusOr<PrefillWorker::Run> {
        loaded.Notify();
        return absl::InvalidArgumentError("no model");
      },
      &timer);
  loaded.WaitForNotification();
  worker.Stop();
}

}  // namespace
}  // namespace headstart
