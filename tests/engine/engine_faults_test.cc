// What goes wrong while a prompt runs: whatever it is, the request ends with its error, its pages
// go back, and the next one is as good as on a new engine.
#include <gtest/gtest.h>

#include <atomic>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "kernels/base/instant.h"
#include "kernels/base/nonfinite.h"
#include "tests/engine/engine_fixture.h"
#include "tests/testing/notification.h"

namespace headstart {
namespace {

using ::testing::AllOf;
using testing::BackendCall;
using ::testing::HasSubstr;
using testing::KvCollector;
using testing::StatusIs;

constexpr int32_t kLayers = 4;
constexpr int64_t kTokens = 300;

class EngineFaultsTest : public EngineTest {
 protected:
  void SetUp() override {
    testing::TinyModelOptions model;
    model.num_layers = kLayers;
    ASSERT_OK_AND_ASSIGN(test_, MakeEngine(model, /*piece_tokens=*/256));
    job_.token_ids = RandomTokens(kTokens);
    ASSERT_OK(clean_.Run(*test_.engine, job_));
  }

  // After a failure: nothing is held, and the next job gives the bytes of the first.
  void ExpectRecovered() {
    EXPECT_EQ(test_.pool().acquired(), test_.pool().released());
    EXPECT_EQ(test_.pool().free_pages(), test_.pool().num_pages());
    const HostPages& host = test_.engine->host_pages();
    EXPECT_EQ(host.free_chunks(), host.num_chunks());
    const SchedulerLoad load = test_.engine->load();
    EXPECT_EQ(load.acquired, load.released);
    test_.backend->SetHook(nullptr);
    test_.backend->PoisonOutput("", 0);
    PrefillRequest job;
    job.token_ids = job_.token_ids;
    KvCollector sink;
    ASSERT_OK(sink.Run(*test_.engine, job));
    for (int32_t layer = 0; layer < kLayers; ++layer) {
      EXPECT_EQ(test_.Keys(sink, layer), test_.Keys(clean_, layer)) << layer;
      EXPECT_EQ(test_.Values(sink, layer), test_.Values(clean_, layer)) << layer;
    }
  }

  TestEngine test_;
  PrefillRequest job_;
  KvCollector clean_;
};

class EngineFaultsAtLayerTest : public EngineFaultsTest,
                                public ::testing::WithParamInterface<int32_t> {};
INSTANTIATE_TEST_SUITE_P(Layers, EngineFaultsAtLayerTest, ::testing::Range(0, kLayers));

// The request ends while a layer of it is held, by a cancel or by its deadline: no later layer is
// computed.
class EndedInALayerTest : public EngineFaultsAtLayerTest {
 protected:
  // Runs the job; `let_it_end` is called when the layer is reached, and holds it.
  absl::Status RunHeld(const std::function<void()>& let_it_end, KvCollector& kv) {
    const int32_t layer = GetParam();
    test_.backend->SetHook([this, layer, let_it_end](const BackendCall& call) {
      if (call.op != "RopeAndStoreKv") return absl::OkStatus();
      if (held_.exchange(held_.load() || call.layer == layer)) {
        ++calls_after_;
      } else if (call.layer == layer) {
        let_it_end();
      }
      return absl::OkStatus();
    });
    const absl::Status status = kv.Run(*test_.engine, job_).status();
    EXPECT_EQ(calls_after_, 0);
    return status;
  }

  std::atomic<bool> held_{false};
  std::atomic<int> calls_after_{0};
};
INSTANTIATE_TEST_SUITE_P(Layers, EndedInALayerTest, ::testing::Range(0, kLayers));

TEST_P(EndedInALayerTest, ACancelIsSeenBeforeTheNextLayer) {
  KvCollector kv;
  uint64_t key = 0;
  testing::Notification submitted;
  kv.on_submitted = [&](const Submission& submission) {
    key = submission.key;
    submitted.Notify();
  };
  EXPECT_THAT(RunHeld(
                  [&] {
                    submitted.WaitForNotification();
                    test_.engine->End(key, absl::CancelledError("nobody wants it"));
                  },
                  kv),
              StatusIs(absl::StatusCode::kCancelled, HasSubstr("nobody wants it")));
  ExpectRecovered();
}

TEST_P(EndedInALayerTest, ADeadlineIsSeenBeforeTheNextLayer) {
  job_.deadline = Instant::Now() + absl::Milliseconds(300);
  KvCollector kv;
  // Holds the layer until everyone was told that the deadline has passed.
  EXPECT_THAT(RunHeld(
                  [&] {
                    while (test_.engine->load().inflight_requests > 0 &&
                           Instant::Now() < job_.deadline + absl::Milliseconds(50)) {
                      std::this_thread::yield();
                    }
                  },
                  kv),
              StatusIs(absl::StatusCode::kDeadlineExceeded,
                       HasSubstr("the deadline passed before the prompt was computed")));
  ExpectRecovered();
}

TEST_P(EngineFaultsAtLayerTest, BackendErrorsEndTheJob) {
  const int32_t layer = GetParam();
  for (const std::string op : {"RmsNorm", "Linear", "RopeAndStoreKv", "CopyOut", "Wait"}) {
    SCOPED_TRACE(op);
    test_.backend->SetHook([&](const BackendCall& call) {
      return call.op == op && call.layer == layer ? absl::ResourceExhaustedError("out of memory")
                                                  : absl::OkStatus();
    });
    KvCollector sink;
    EXPECT_THAT(sink.Run(*test_.engine, job_),
                StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("out of memory")));
    for (const testing::CollectedChunk& chunk : sink.chunks()) EXPECT_LT(chunk.layer, layer);
    ExpectRecovered();
  }
}

// A NaN in the output of a layer is found in the next layer's KV; in the last one's, in the logits.
TEST_P(EngineFaultsAtLayerTest, NanInTheFeedForwardIsNamedWithItsLayer) {
  const int32_t layer = GetParam();
  const bool is_last = layer + 1 == kLayers;
  job_.token_ids.resize(1);  // the row that the logits are made of
  test_.backend->PoisonOutput("SwiGlu", layer);
  KvCollector sink;
  const absl::Status status = sink.Run(*test_.engine, job_).status();
  EXPECT_THAT(status,
              StatusIs(absl::StatusCode::kInternal,
                       AllOf(HasSubstr("not finite"),
                             HasSubstr(is_last ? "logit" : "layer " + std::to_string(layer + 1)))));
  EXPECT_TRUE(IsNonFiniteError(status));
  job_.token_ids = RandomTokens(kTokens);
  ExpectRecovered();
}

// A NaN before the projections is found in the KV of the same layer.
TEST_P(EngineFaultsAtLayerTest, NanInTheKvIsNamedWithItsLayer) {
  test_.backend->PoisonOutput("RmsNorm", GetParam());
  KvCollector sink;
  const absl::Status status = sink.Run(*test_.engine, job_).status();
  EXPECT_THAT(status, StatusIs(absl::StatusCode::kInternal,
                               HasSubstr("KV of layer " + std::to_string(GetParam()))));
  EXPECT_TRUE(IsNonFiniteError(status));
  // Nothing of the layer was published.
  for (const testing::CollectedChunk& chunk : sink.chunks()) EXPECT_LT(chunk.layer, GetParam());
  ExpectRecovered();
}

TEST_F(EngineFaultsTest, APromptThatIsTooLateDoesNotStart) {
  const int64_t embeds = test_.backend->CountCalls("Embed");
  KvCollector sink;
  job_.deadline = Instant::Now() - absl::Seconds(1);
  EXPECT_THAT(sink.Run(*test_.engine, job_), StatusIs(absl::StatusCode::kDeadlineExceeded));
  EXPECT_EQ(test_.backend->CountCalls("Embed"), embeds);
  ExpectRecovered();
}

// An INTERNAL that is no NaN: the backend is lost, and with it the engine.
TEST_F(EngineFaultsTest, ErrorsBehindTheLastLayerLoseTheEngine) {
  for (const char* op : {"Download", "TakeTimes"}) {
    ASSERT_OK_AND_ASSIGN(test_, TestEngine::Create(Options(dir_.path())));
    absl::Status lost;
    test_.engine->OnLost([&](const absl::Status& status) { lost = status; });
    test_.backend->SetHook([op](const BackendCall& call) {
      return call.op == op ? absl::InternalError("device lost") : absl::OkStatus();
    });
    KvCollector sink;
    EXPECT_THAT(sink.Run(*test_.engine, job_),
                StatusIs(absl::StatusCode::kInternal, HasSubstr("device lost")));
    EXPECT_THAT(test_.engine->CheckOpen(), StatusIs(absl::StatusCode::kUnavailable));
    test_.engine.reset();
    EXPECT_THAT(lost, StatusIs(absl::StatusCode::kInternal, HasSubstr("device lost")));
  }
}

// Every allocation of start-up may fail.
TEST_F(EngineFaultsTest, StartUpWithoutMemoryIsAnError) {
  const EngineOptions options = Options(dir_.path());
  int64_t allocations = 0;
  for (int64_t failing = 0;; ++failing) {
    ASSERT_OK_AND_ASSIGN(auto inner, MakeBackend(options.backend));
    auto backend = std::make_unique<testing::FaultBackend>(std::move(inner));
    allocations = 0;
    backend->SetHook([&](const BackendCall& call) {
      return (call.op == "Allocate" || call.op == "AllocateHost") && allocations++ == failing
                 ? absl::ResourceExhaustedError("no room")
                 : absl::OkStatus();
    });
    const auto engine = testing::MakeEngine(options, std::move(backend));
    if (failing == allocations) {  // none was left to fail
      EXPECT_OK(engine);
      break;
    }
    EXPECT_THAT(engine, StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("no room")));
  }
  // KV, 64 slots, eight buffers of activations, twice, fp8 on its way; of the host: flags, twice,
  // and KV.
  EXPECT_EQ(allocations, 85);
}

}  // namespace
}  // namespace headstart
