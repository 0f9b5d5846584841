// What becomes of spans when the collector is there, slow, choosy, or gone.
#include "server/ops/span_exporter.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "kernels/base/instant.h"

namespace headstart {
namespace {

using ::testing::ElementsAre;

constexpr absl::Duration kLong = absl::Minutes(10);

// A collector under the test's control; what it has seen outlives the exporter.
struct Collector {
  Mutex mutex;
  CondVar changed;
  bool open ABSL_GUARDED_BY(mutex) = true;  // else Send waits
  bool cancelled ABSL_GUARDED_BY(mutex) = false;
  std::vector<absl::StatusOr<int64_t>> answers ABSL_GUARDED_BY(mutex);  // then: OK
  std::vector<TraceExport> batches ABSL_GUARDED_BY(mutex);
  std::vector<Instant> deadlines ABSL_GUARDED_BY(mutex);

  void SetOpen(bool is_open) {
    MutexLock lock(&mutex);
    open = is_open;
    changed.SignalAll();
  }
  void WaitForBatches(size_t count) {
    MutexLock lock(&mutex);
    while (batches.size() < count) changed.Wait(&mutex);
  }
  std::vector<int> Sizes() {
    MutexLock lock(&mutex);
    std::vector<int> sizes;
    for (const TraceExport& batch : batches) {
      sizes.push_back(batch.resource_spans(0).scope_spans(0).spans_size());
    }
    return sizes;
  }
};

class FakeSink final : public SpanSink {
 public:
  explicit FakeSink(Collector* collector) : c_(*collector) {}

  absl::StatusOr<int64_t> Send(const TraceExport& spans, Instant deadline) override {
    MutexLock lock(&c_.mutex);
    c_.batches.push_back(spans);
    c_.deadlines.push_back(deadline);
    c_.changed.SignalAll();
    while (!c_.open && !c_.cancelled) c_.changed.Wait(&c_.mutex);
    if (c_.cancelled) return absl::CancelledError("cancelled");
    if (c_.answers.empty()) return 0;
    const absl::StatusOr<int64_t> answer = c_.answers.front();
    c_.answers.erase(c_.answers.begin());
    return answer;
  }
  void Cancel() override {
    MutexLock lock(&c_.mutex);
    c_.cancelled = true;
    c_.changed.SignalAll();
  }

 private:
  Collector& c_;
};

class SpanExporterTest : public ::testing::Test {
 protected:
  void Start() {
    TraceResource resource;
    resource.add_attributes()->set_key("service.name");
    exporter_ =
        std::make_unique<SpanExporter>(options_, resource, std::make_unique<FakeSink>(&collector_));
  }
  void Push(int count) {
    std::vector<TraceSpan> spans(static_cast<size_t>(count));
    for (TraceSpan& span : spans) span.set_name(absl::StrCat(next_++));
    exporter_->Push(std::move(spans));
  }
  // Everything that was pushed has ended as one or the other.
  void WaitUntilAccounted(int64_t exported, int64_t dropped) const {
    const Instant end = Instant::Now() + absl::Seconds(20);
    while ((exporter_->exported() != exported || exporter_->dropped() != dropped) &&
           Instant::Now() < end) {
      absl::SleepFor(absl::Milliseconds(1));
    }
    EXPECT_EQ(exporter_->exported(), exported);
    EXPECT_EQ(exporter_->dropped(), dropped);
  }

  Collector collector_;
  SpanExporterOptions options_{.interval = kLong, .min_backoff = absl::Milliseconds(1)};
  std::unique_ptr<SpanExporter> exporter_;
  int next_ = 0;
};

TEST_F(SpanExporterTest, SendsWholeBatchesInOrderAndTheRestAtTheEnd) {
  options_.batch = 4;
  Start();
  Push(3);
  Push(7);
  collector_.WaitForBatches(2);
  WaitUntilAccounted(8, 0);
  EXPECT_THAT(collector_.Sizes(), ElementsAre(4, 4));  // two wait for more
  exporter_.reset();
  EXPECT_THAT(collector_.Sizes(), ElementsAre(4, 4, 2));
  MutexLock lock(&collector_.mutex);
  int expected = 0;
  for (const TraceExport& batch : collector_.batches) {
    EXPECT_EQ(batch.resource_spans(0).resource().attributes(0).key(), "service.name");
    EXPECT_EQ(batch.resource_spans(0).scope_spans(0).scope().name(), "headstart");
    for (const TraceSpan& span : batch.resource_spans(0).scope_spans(0).spans()) {
      EXPECT_EQ(span.name(), absl::StrCat(expected++));
    }
  }
}

TEST_F(SpanExporterTest, FewSpansGoAfterTheInterval) {
  options_.interval = absl::Milliseconds(1);
  Start();
  Push(1);
  WaitUntilAccounted(1, 0);
}

TEST_F(SpanExporterTest, ACollectorThatHangsCostsDropsAndNoTime) {
  options_.batch = 2;
  options_.capacity = 5;
  collector_.SetOpen(false);
  Start();
  Push(2);
  collector_.WaitForBatches(1);  // and hangs in it
  Push(3);
  Push(3);  // one too many: none of them
  EXPECT_EQ(exporter_->dropped(), 3);
  Push(2);
  Push(1);
  EXPECT_EQ(exporter_->dropped(), 4);
  collector_.SetOpen(true);
  WaitUntilAccounted(6, 4);  // one waits for more
}

TEST_F(SpanExporterTest, TriesAgainWhatMayWorkLater) {
  options_.batch = 2;
  {
    MutexLock lock(&collector_.mutex);
    collector_.answers = {absl::UnavailableError("away"), absl::DeadlineExceededError("slow"), 0};
  }
  Start();
  Push(2);
  WaitUntilAccounted(2, 0);
  EXPECT_THAT(collector_.Sizes(), ElementsAre(2, 2, 2));
}

TEST_F(SpanExporterTest, GivesUpWhatTheCollectorRefuses) {
  options_.batch = 2;
  {
    MutexLock lock(&collector_.mutex);
    collector_.answers = {absl::UnimplementedError("no traces here"), 1, 1000, -5};
  }
  Start();
  Push(8);
  WaitUntilAccounted(1 + 2, 2 + 1 + 2);
}

TEST_F(SpanExporterTest, EveryTryHasADeadline) {
  options_.batch = 1;
  options_.send_timeout = absl::Seconds(7);
  Start();
  const Instant before = Instant::Now();
  Push(1);
  WaitUntilAccounted(1, 0);
  MutexLock lock(&collector_.mutex);
  EXPECT_GE(collector_.deadlines[0], before + absl::Seconds(7));
  EXPECT_LE(collector_.deadlines[0], Instant::Now() + absl::Seconds(7));
}

TEST_F(SpanExporterTest, EndsAlthoughTheCollectorHangs) {
  options_.flush_timeout = absl::Milliseconds(10);
  options_.batch = 1;
  collector_.SetOpen(false);
  Start();
  Push(2);
  collector_.WaitForBatches(1);
  exporter_.reset();
  MutexLock lock(&collector_.mutex);
  EXPECT_TRUE(collector_.cancelled);
}

TEST_F(SpanExporterTest, EndsAtOnceBetweenTwoTries) {
  options_.min_backoff = options_.max_backoff = options_.flush_timeout = kLong;
  options_.batch = 1;
  {
    MutexLock lock(&collector_.mutex);
    collector_.answers = {absl::UnavailableError("away"), absl::UnavailableError("away")};
  }
  Start();
  Push(1);
  collector_.WaitForBatches(1);
  exporter_.reset();
  EXPECT_LE(collector_.Sizes().size(), 2u);
}

}  // namespace
}  // namespace headstart
