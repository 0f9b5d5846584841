// Engine with its real threads, and everybody who calls it at once: clients that read, break off,
// come back, share prefixes and fail to come at all. For ThreadSanitizer, and for what must hold
// whoever is first.
#include <gtest/gtest.h>

#include <atomic>
#include <memory>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "engine/engine.h"
#include "kernels/base/instant.h"
#include "kernels/base/mutex.h"
#include "tests/engine/schedule/publish.h"
#include "tests/testing/bell.h"
#include "tests/testing/status_matchers.h"

namespace headstart {
namespace {

using testing::Bell;

constexpr int kClients = 8;
constexpr int kRequestsOfAClient = 60;
constexpr int32_t kStripes = 3;

SchedulerOptions Scheduling() {
  SchedulerOptions options;
  options.geometry = {.num_layers = 4, .heads = {.num_heads = 4, .num_kv_heads = 2, .head_dim = 8}};
  options.piece_tokens = 512;
  options.batch_tokens = 256;
  options.num_slots = 4;
  options.max_requests = 12;
  options.default_lease = absl::Milliseconds(20);
  options.max_lease = absl::Milliseconds(20);
  options.stall_timeout = absl::Milliseconds(50);
  return options;
}

// Publishes KV that nobody wrote, and lets others in between layers.
class QuickRunner : public Runner {
 public:
  StepResult Run(Step& step, UrgentWork* urgent) override {
    EXPECT_FALSE(step.urgent && urgent != nullptr);
    StepResult results(step.pieces.size());
    for (int32_t layer = 0; layer < Scheduling().geometry.num_layers; ++layer) {
      while (urgent != nullptr) {
        std::optional<Step> inside = urgent->Next();
        if (!inside.has_value()) break;
        StepResult result = Run(*inside, nullptr);
        urgent->Finish(*std::move(inside), std::move(result));
      }
      for (size_t i = 0; i < step.pieces.size(); ++i) {
        Piece& piece = step.pieces[i];
        if (piece.cancelled->load()) results[i].status = CancelledBefore(layer);
        if (results[i].status.ok() && !piece.chunks.empty()) PublishLayer(piece, layer);
      }
      ++layers_;
    }
    for (size_t i = 0; i < step.pieces.size(); ++i) {
      results[i].result.compute_seconds = 1e-4;
      if (step.pieces[i].keep_state) results[i].state = std::make_shared<const SlotState>(1);
    }
    return results;
  }
  int64_t layers_done() const override { return layers_.load(); }

 private:
  std::atomic<int64_t> layers_{0};
};

std::unique_ptr<Engine> MakeQuickEngine() {
  const SchedulerOptions scheduling = Scheduling();
  ResolvedModel model;
  model.geometry = scheduling.geometry;
  auto engine = std::make_unique<Engine>(
      std::move(model), scheduling, "hash", nullptr, std::make_unique<PagePool>(40),
      std::make_unique<HostPages>(nullptr, scheduling.geometry.chunk_bytes(),
                                  3 * PieceChunks(scheduling)),
      std::make_unique<QuickRunner>());
  engine->Open();
  return engine;
}

// Reads up to `most` chunks or to the end; acknowledges as it goes. Returns how it ended, if it
// did.
std::optional<absl::Status> Read(std::unique_ptr<ShipmentReader> reader, Bell& bell, int64_t most,
                                 int64_t* next) {
  reader->WakeWith([&bell] { bell.Ring(); });
  for (;;) {
    const ShipmentReader::Event event = reader->Next();
    if (const auto* ended = std::get_if<ShipmentReader::Ended>(&event)) return ended->status;
    if (std::holds_alternative<ShipmentReader::Waiting>(event)) bell.Wait();
    const auto* chunk = std::get_if<ShipmentReader::Chunk>(&event);
    if (chunk == nullptr) continue;
    EXPECT_EQ(chunk->index, *next);
    ++*next;
    EXPECT_OK(reader->Acknowledge(*next));
    if (*next >= most) return std::nullopt;
  }
}

class ClientThread {
 public:
  ClientThread(Engine* engine, int number)
      : engine_(*engine), number_(number), random_(static_cast<uint64_t>(number)) {}

  void Run() {
    for (int i = 0; i < kRequestsOfAClient; ++i) One(absl::StrCat(number_, "-", i));
  }
  int64_t computed() const { return computed_; }

 private:
  int64_t Draw(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random_);
  }

  PrefillRequest DrawRequest(const std::string& id) {
    PrefillRequest request;
    request.request_id = id;
    request.token_ids.resize(static_cast<size_t>(Draw(1, 1600)), static_cast<int32_t>(Draw(1, 2)));
    request.priority = static_cast<int32_t>(Draw(-1, 1));
    request.attention.enabled = Draw(0, 1) == 1;
    request.prefix.cache_root = request.attention.enabled ? "sparse" : "dense";
    request.prefix.any_page = !request.attention.enabled;
    request.skip_tokens = Draw(0, 3) == 0 ? request.num_tokens() / 2 : 0;
    request.deadline = Instant::Now() + absl::Milliseconds(Draw(0, 9) == 0 ? Draw(1, 5) : 10000);
    return request;
  }

  void One(const std::string& id) {
    PrefillRequest request = DrawRequest(id);
    const bool detached = Draw(0, 1) == 1;
    if (detached) {
      for (int32_t i = 0; i < kStripes; ++i) {
        KvPart part = WholeKv(Scheduling().geometry);
        part.stripe_index = i;
        part.stripe_count = kStripes;
        request.detached.emplace();
        parts_[i] = part;
      }
      if (Draw(0, 1) == 1) request.detached->readers.assign(parts_.begin(), parts_.end());
    }
    engine_.NamePages(request);
    (void)engine_.Estimate(request);
    absl::StatusOr<Submission> submission = engine_.Submit(std::move(request));
    if (!submission.ok()) return;
    if (detached) {
      FetchAll(*submission);
    } else {
      const int64_t most = Draw(0, 4) == 0 ? Draw(0, 10) : 1 << 20;
      Bell bell;
      int64_t next = 0;
      const auto end = Read(std::move(submission->reader), bell, most, &next);
      if (end.has_value() && end->ok()) ++computed_;
    }
    engine_.End(submission->key, absl::CancelledError("over"));
  }

  // Some readers break off and come back, some never come.
  void FetchAll(const Submission& submission) {
    const int64_t how = Draw(0, 9);
    if (how == 0) return;
    for (int32_t i = 0; i < kStripes; ++i) {
      Bell bell;
      int64_t next = 0;
      for (;;) {
        auto reader = engine_.Fetch(submission.fetch_id, "", parts_[i], next);
        if (!reader.ok()) return;
        const int64_t most = how < 4 ? next + 3 : 1 << 20;
        const auto end = Read(*std::move(reader), bell, most, &next);
        if (end.has_value() && !end->ok()) return;
        if (end.has_value()) break;
      }
    }
    ++computed_;
    (void)engine_.Renew(submission.fetch_id, "");
    if (how < 7) (void)engine_.Release(submission.fetch_id, "");
  }

  Engine& engine_;
  const int number_;
  std::mt19937_64 random_;
  std::array<KvPart, kStripes> parts_;
  int64_t computed_ = 0;
};

TEST(EngineThreadsTest, EverythingGoesBackWhateverHappensAtOnce) {
  std::unique_ptr<Engine> engine = MakeQuickEngine();
  std::vector<std::unique_ptr<ClientThread>> clients;
  std::vector<std::thread> threads;
  for (int i = 0; i < kClients; ++i) {
    clients.push_back(std::make_unique<ClientThread>(engine.get(), i));
    threads.emplace_back([client = clients.back().get()] { client->Run(); });
  }
  std::atomic<bool> over{false};
  threads.emplace_back([&] {  // whoever scrapes and routes
    while (!over) {
      (void)engine->load();
      (void)engine->PredictDrain();
      (void)engine->page_pool().cached_pages();
      absl::SleepFor(absl::Milliseconds(1));
    }
  });
  for (int i = 0; i < kClients; ++i) threads[static_cast<size_t>(i)].join();
  over = true;
  threads.back().join();
  EXPECT_TRUE(engine->WaitUntilIdle(Instant::Now() + absl::Seconds(60)));
  int64_t computed = 0;
  for (const auto& client : clients) computed += client->computed();
  EXPECT_GT(computed, kClients * kRequestsOfAClient / 4);
  const SchedulerLoad load = engine->load();
  EXPECT_EQ(load.acquired, load.released);
  EXPECT_GT(load.urgent_steps, 0);
  EXPECT_GT(load.cached_tokens, 0);
  EXPECT_EQ(engine->page_pool().free_pages(), engine->page_pool().num_pages());
  EXPECT_EQ(engine->page_pool().acquired(), engine->page_pool().released());
  EXPECT_EQ(engine->host_pages().free_chunks(), engine->host_pages().num_chunks());
}

TEST(EngineThreadsTest, EndsWhileEverybodyIsAtIt) {
  for (int round = 0; round < 20; ++round) {
    std::unique_ptr<Engine> engine = MakeQuickEngine();
    std::vector<std::unique_ptr<ShipmentReader>> readers;
    for (int i = 0; i < 8; ++i) {
      PrefillRequest request;
      request.request_id = absl::StrCat(i);
      request.token_ids.resize(1000);
      auto submission = engine->Submit(std::move(request));
      if (submission.ok()) readers.push_back(std::move(submission->reader));
    }
    std::thread closes([&] { engine->Close(absl::UnavailableError("draining")); });
    closes.join();
    readers.clear();
    engine.reset();
  }
}

}  // namespace
}  // namespace headstart
