// Shipments under real threads: compute, readers and whoever closes. For ThreadSanitizer, and for
// what must hold whoever is first.
#include <gtest/gtest.h>

#include <atomic>
#include <memory>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "engine/ship/shipment.h"
#include "kernels/base/mutex.h"
#include "tests/testing/bell.h"
#include "tests/testing/status_matchers.h"

namespace headstart {
namespace {

using testing::Bell;

using Keep = Shipment::Keep;

constexpr int32_t kStressLayers = 4;
constexpr int32_t kStressStripes = 3;
constexpr int64_t kPieces = 100;
constexpr uint64_t kStressOwner = 1;
constexpr KvGeometry kStressGeometry = {
    .num_layers = kStressLayers, .heads = {.num_heads = 4, .num_kv_heads = 2, .head_dim = 8}};

class ShipmentStress {
 public:
  ShipmentStress(Keep keep, std::vector<KvPart> announced, int64_t host_chunks)
      : pages_(nullptr, kStressGeometry.chunk_bytes(), host_chunks),
        shipment_(std::make_shared<Shipment>(kStressGeometry, keep, std::move(announced))) {
    pages_.NotifyRoom([this] { room_.Ring(); });
  }

  // A chunk of every layer a piece; waits for room as a scheduler would.
  void Compute() {
    shipment_->Start();
    for (int64_t i = 0; i < kPieces && !closed_; ++i) {
      std::vector<HostChunk> memory = pages_.Take(kStressLayers, kStressOwner);
      while (memory.empty() && !closed_) {
        room_.Wait();
        memory = pages_.Take(kStressLayers, kStressOwner);
      }
      for (size_t layer = 0; layer < memory.size(); ++layer) {
        shipment_->Publish({static_cast<int32_t>(layer),
                            {i * kBlockTokens, kBlockTokens},
                            std::make_shared<const HostChunk>(std::move(memory[layer]))});
      }
    }
  }

  // Reads the part to its end, `breaks` times on a new reader. Returns how it ended and how many
  // chunks there were, each once and in order.
  std::pair<absl::Status, int64_t> Read(const KvPart& part, int breaks) {
    int64_t next = 0;
    for (;; --breaks) {
      Bell bell;  // outlives the reader
      auto reader = shipment_->Open(part, next);
      if (!reader.ok()) return {reader.status(), next};
      (*reader)->WakeWith([&bell] { bell.Ring(); });
      const std::optional<absl::Status> end = Follow(**reader, bell, breaks > 0 ? 20 : -1, next);
      if (end.has_value()) return {*end, next};
    }
  }

  void Close(const absl::Status& why) {
    closed_ = true;
    shipment_->Close(why);
    room_.Ring();
  }

  const HostPages& pages() const { return pages_; }
  Shipment& shipment() { return *shipment_; }

 private:
  // None when the reader broke after `limit` chunks.
  static std::optional<absl::Status> Follow(ShipmentReader& reader, Bell& bell, int64_t limit,
                                            int64_t& next) {
    while (limit-- != 0) {
      ShipmentReader::Event event = reader.Next();
      if (const auto* ended = std::get_if<ShipmentReader::Ended>(&event)) return ended->status;
      if (std::holds_alternative<ShipmentReader::Waiting>(event)) bell.Wait();
      const auto* chunk = std::get_if<ShipmentReader::Chunk>(&event);
      if (chunk == nullptr) continue;
      if (chunk->index != next) return absl::InternalError("a chunk twice or left out");
      ++next;
      if (next % 3 == 0) {
        const absl::Status acked = reader.Acknowledge(next);
        if (!acked.ok()) return acked;
      }
    }
    return std::nullopt;
  }

  HostPages pages_;
  Bell room_;
  std::atomic<bool> closed_{false};
  std::shared_ptr<Shipment> shipment_;
};

std::vector<KvPart> Stripes() {
  std::vector<KvPart> parts;
  for (int32_t i = 0; i < kStressStripes; ++i) {
    parts.push_back({.layer_count = kStressLayers,
                     .head_count = 2,
                     .stripe_index = i,
                     .stripe_count = kStressStripes});
  }
  return parts;
}

TEST(ShipmentStressTest, StripesFollowComputeThroughAWindow) {
  // Three chunks of each stripe may be unacknowledged: the window is that and one piece.
  ShipmentStress stress(Keep::kUntilAcknowledged, Stripes(), 3 * kStressStripes + kStressLayers);
  std::vector<std::pair<absl::Status, int64_t>> ends(kStressStripes);
  std::vector<std::thread> threads;
  for (int32_t i = 0; i < kStressStripes; ++i) {
    threads.emplace_back([&, i] { ends[i] = stress.Read(Stripes()[i], 4); });
  }
  stress.Compute();
  stress.shipment().Complete({});
  for (std::thread& thread : threads) thread.join();
  int64_t chunks = 0;
  for (const auto& [status, count] : ends) {
    EXPECT_OK(status);
    chunks += count;
  }
  EXPECT_EQ(chunks, kPieces * kStressLayers);
  stress.Close(absl::AbortedError("released"));
  EXPECT_EQ(stress.pages().free_chunks(), stress.pages().num_chunks());
}

TEST(ShipmentStressTest, ReadersComeAndGoWhileItIsClosed) {
  for (int round = 0; round < 20; ++round) {
    ShipmentStress stress(Keep::kUntilClosed, {}, kPieces * kStressLayers);
    std::vector<std::thread> threads;
    for (const KvPart& part : Stripes()) {
      threads.emplace_back([&stress, part] {
        const auto [status, count] = stress.Read(part, 2);
        EXPECT_THAT(status, testing::StatusIs(absl::StatusCode::kAborted));
      });
    }
    std::thread compute([&] { stress.Compute(); });
    std::thread closer([&, round] {
      while (stress.shipment().kept_chunks() < 10 * round) std::this_thread::yield();
      stress.Close(absl::AbortedError("closed"));
    });
    compute.join();
    closer.join();
    for (std::thread& thread : threads) thread.join();
    EXPECT_EQ(stress.pages().free_chunks(), stress.pages().num_chunks());
  }
}

TEST(ShipmentStressTest, OneReaderTakesWhileOthersLook) {
  ShipmentStress stress(Keep::kUntilTaken, {}, kStressLayers);
  const KvPart whole = WholeKv(kStressGeometry);
  std::atomic<bool> done{false};
  std::thread looker([&] {
    while (!done) {
      EXPECT_LE(stress.shipment().kept_chunks(), kStressLayers);
      EXPECT_LE(stress.pages().held(kStressOwner), kStressLayers);
    }
  });
  std::thread compute([&] {
    stress.Compute();
    stress.shipment().Complete({});
  });
  const auto [status, count] = stress.Read(whole, 0);
  done = true;
  EXPECT_OK(status);
  EXPECT_EQ(count, kPieces * kStressLayers);
  compute.join();
  looker.join();
  EXPECT_EQ(stress.pages().free_chunks(), kStressLayers);
}

}  // namespace
}  // namespace headstart
