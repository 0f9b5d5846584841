// What goes wrong while a prompt runs: whatever it is, the job ends with its error, its pages go
// back, and the next job is as good as on a new engine.
#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <thread>
#include <vector>

#include "absl/time/clock.h"
#include "kernels/base/nonfinite.h"
#include "tests/engine/engine_fixture.h"
#include "tests/testing/notification.h"

namespace headstart {
namespace {

using ::testing::AllOf;
using testing::BackendCall;
using testing::FakeSink;
using ::testing::HasSubstr;
using testing::StatusIs;

constexpr int32_t kLayers = 4;
constexpr int64_t kTokens = 300;

class EngineFaultsTest : public EngineTest {
 protected:
  void SetUp() override {
    testing::TinyModelOptions model;
    model.num_layers = kLayers;
    ASSERT_OK_AND_ASSIGN(test_, MakeEngine(model, /*chunk_tokens=*/256));
    job_.token_ids = RandomTokens(kTokens);
    ASSERT_OK(test_.engine->RunPrefill(job_, clean_));
  }

  // After a failure: nothing is held, and the next job gives the bytes of the first.
  void ExpectRecovered() {
    EXPECT_EQ(test_.pool().acquired(), test_.pool().released());
    EXPECT_EQ(test_.pool().free_pages(), test_.pool().num_pages());
    test_.backend->SetHook(nullptr);
    test_.backend->PoisonOutput("", 0);
    PrefillJob job;
    job.token_ids = job_.token_ids;
    FakeSink sink;
    ASSERT_OK(test_.engine->RunPrefill(job, sink));
    for (int32_t layer = 0; layer < kLayers; ++layer) {
      EXPECT_EQ(test_.Keys(sink, layer), test_.Keys(clean_, layer)) << layer;
      EXPECT_EQ(test_.Values(sink, layer), test_.Values(clean_, layer)) << layer;
    }
  }

  TestEngine test_;
  PrefillJob job_;
  FakeSink clean_;
};

class EngineFaultsAtLayerTest : public EngineFaultsTest,
                                public ::testing::WithParamInterface<int32_t> {};
INSTANTIATE_TEST_SUITE_P(Layers, EngineFaultsAtLayerTest, ::testing::Range(0, kLayers));

// The job is cancelled by another thread while the layer is held.
TEST_P(EngineFaultsAtLayerTest, CancelIsSeenBeforeTheNextLayer) {
  const int32_t layer = GetParam();
  testing::Notification reached, cancelled;
  test_.backend->SetHook([&](const BackendCall& call) {
    if (call.op == "RopeAndStoreKv" && call.layer == layer && !reached.HasBeenNotified()) {
      reached.Notify();
      cancelled.WaitForNotification();
    }
    return absl::OkStatus();
  });
  std::thread client([&] {
    reached.WaitForNotification();
    job_.cancelled = true;
    cancelled.Notify();
  });
  FakeSink sink;
  const absl::Status status = test_.engine->RunPrefill(job_, sink).status();
  client.join();
  // Behind the last layer comes the next chunk.
  const int32_t seen_before = (layer + 1) % kLayers;
  EXPECT_THAT(status, StatusIs(absl::StatusCode::kCancelled,
                               HasSubstr("before layer " + std::to_string(seen_before))));
  // The layer itself was finished; it would have left behind the next one.
  EXPECT_EQ(sink.chunks().size(), layer);
  ExpectRecovered();
}

TEST_P(EngineFaultsAtLayerTest, DeadlineIsSeenBeforeTheNextLayer) {
  const int32_t layer = GetParam();
  job_.deadline = absl::Now() + absl::Seconds(1);
  test_.backend->SetHook([&](const BackendCall& call) {
    // Holds the layer until the deadline has passed.
    while (call.op == "RopeAndStoreKv" && call.layer == layer && absl::Now() < job_.deadline) {
      std::this_thread::yield();
    }
    return absl::OkStatus();
  });
  FakeSink sink;
  const int32_t seen_before = (layer + 1) % kLayers;
  EXPECT_THAT(test_.engine->RunPrefill(job_, sink),
              StatusIs(absl::StatusCode::kDeadlineExceeded,
                       HasSubstr("before layer " + std::to_string(seen_before))));
  EXPECT_EQ(sink.chunks().size(), layer);
  ExpectRecovered();
}

TEST_P(EngineFaultsAtLayerTest, BackendErrorsEndTheJob) {
  const int32_t layer = GetParam();
  for (const std::string op : {"RmsNorm", "Linear", "RopeAndStoreKv", "ReadKv"}) {
    SCOPED_TRACE(op);
    // A layer is read behind the next one.
    const int32_t layers_sent = op == "ReadKv" ? layer : std::max(layer - 1, 0);
    test_.backend->SetHook([&](const BackendCall& call) {
      return call.op == op && call.layer == layer ? absl::ResourceExhaustedError("out of memory")
                                                  : absl::OkStatus();
    });
    FakeSink sink;
    EXPECT_THAT(test_.engine->RunPrefill(job_, sink),
                StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("out of memory")));
    EXPECT_EQ(sink.chunks().size(), layers_sent);
    ExpectRecovered();
  }
}

// A NaN in the output of a layer is found in the next layer's KV; in the last one's, in the logits.
TEST_P(EngineFaultsAtLayerTest, NanInTheFeedForwardIsNamedWithItsLayer) {
  const int32_t layer = GetParam();
  const bool is_last = layer + 1 == kLayers;
  job_.token_ids.resize(1);  // the row that the logits are made of
  test_.backend->PoisonOutput("SwiGlu", layer);
  FakeSink sink;
  const absl::Status status = test_.engine->RunPrefill(job_, sink).status();
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
  FakeSink sink;
  const absl::Status status = test_.engine->RunPrefill(job_, sink).status();
  EXPECT_THAT(status, StatusIs(absl::StatusCode::kInternal,
                               HasSubstr("KV of layer " + std::to_string(GetParam()))));
  EXPECT_TRUE(IsNonFiniteError(status));
  EXPECT_EQ(sink.chunks().size(), GetParam());  // nothing of the layer was committed
  ExpectRecovered();
}

TEST_P(EngineFaultsAtLayerTest, SinkErrorsArePassedOn) {
  const int32_t layer = GetParam();
  for (const bool at_commit : {false, true}) {
    FakeSink sink;
    if (at_commit) {
      sink.on_commit = [layer](const testing::SunkChunk& chunk) {
        return chunk.info.layer == layer ? absl::CancelledError("reader stalled")
                                         : absl::OkStatus();
      };
    } else {
      sink.on_reserve = [layer](const KvChunkInfo& chunk) {
        return chunk.layer == layer ? absl::CancelledError("reader stalled") : absl::OkStatus();
      };
    }
    EXPECT_THAT(test_.engine->RunPrefill(job_, sink),
                StatusIs(absl::StatusCode::kCancelled, HasSubstr("reader stalled")));
    EXPECT_EQ(sink.chunks().size(), layer);
    ExpectRecovered();
  }
}

TEST_F(EngineFaultsTest, SinkThatDoesNotStartEndsTheJobBeforeItComputes) {
  FakeSink sink;
  sink.start_status = absl::UnavailableError("gone");
  const int64_t embeds = test_.backend->CountCalls("Embed");
  EXPECT_THAT(test_.engine->RunPrefill(job_, sink), StatusIs(absl::StatusCode::kUnavailable));
  EXPECT_EQ(test_.backend->CountCalls("Embed"), embeds);
  ExpectRecovered();
}

TEST_F(EngineFaultsTest, JobsThatNobodyWantsDoNotStart) {
  const int64_t embeds = test_.backend->CountCalls("Embed");
  FakeSink sink;
  job_.deadline = absl::Now() - absl::Seconds(1);
  EXPECT_THAT(test_.engine->RunPrefill(job_, sink), StatusIs(absl::StatusCode::kDeadlineExceeded));
  job_.cancelled = true;
  EXPECT_THAT(test_.engine->RunPrefill(job_, sink), StatusIs(absl::StatusCode::kCancelled));
  EXPECT_EQ(test_.backend->CountCalls("Embed"), embeds);
  ExpectRecovered();
}

TEST_F(EngineFaultsTest, ErrorsBehindTheLastLayerEndTheJob) {
  for (const char* op : {"Download", "ReadStats"}) {
    test_.backend->SetHook([op](const BackendCall& call) {
      return call.op == op ? absl::InternalError("device lost") : absl::OkStatus();
    });
    FakeSink sink;
    const absl::Status status = test_.engine->RunPrefill(job_, sink).status();
    EXPECT_THAT(status, StatusIs(absl::StatusCode::kInternal, HasSubstr("device lost")));
    EXPECT_FALSE(IsNonFiniteError(status));
    ExpectRecovered();
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
      return call.op == "Allocate" && allocations++ == failing
                 ? absl::ResourceExhaustedError("no room")
                 : absl::OkStatus();
    });
    const auto engine = Engine::Create(options, std::move(backend), nullptr);
    if (failing == allocations) {  // none was left to fail
      EXPECT_OK(engine);
      break;
    }
    EXPECT_THAT(engine, StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("no room")));
  }
  EXPECT_EQ(allocations, 10);  // KV, page table, eight activations
}

}  // namespace
}  // namespace headstart
