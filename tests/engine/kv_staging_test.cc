// KV that is shipped as fp8: the ring of pages that it waits in, and that nothing in there is
// overwritten before its copy has ended.
#include "engine/run/kv_staging.h"

#include <gtest/gtest.h>

#include <cstring>
#include <deque>
#include <memory>
#include <random>
#include <utility>
#include <variant>
#include <vector>

#include "engine/run/copy_out.h"
#include "kernels/base/status_macros.h"
#include "kernels/cpu/reference_ops.h"
#include "tests/testing/backend_wrapper.h"
#include "tests/testing/status_matchers.h"

namespace headstart {
namespace {

TEST(PageRingTest, RunsLieSideBySideAndComeBackInOrder) {
  PageRing ring(10);
  EXPECT_EQ(ring.Take(4), 0);
  EXPECT_EQ(ring.Take(4), 4);
  EXPECT_EQ(ring.Take(3), std::nullopt);  // two are left, and none in front
  EXPECT_EQ(ring.Take(2), 8);
  ring.GiveBack();
  EXPECT_EQ(ring.Take(5), std::nullopt);
  EXPECT_EQ(ring.Take(4), 0);
  ring.GiveBack();
  ring.GiveBack();
  ring.GiveBack();
  EXPECT_EQ(ring.Take(10), 0) << "an empty ring is all free, wherever the last run ended";
}

// Against a list of the runs that are out.
TEST(PageRingTest, NeverGivesOutAPageThatIsInUse) {
  constexpr int64_t kPages = 23;
  std::mt19937 random(1);
  PageRing ring(kPages);
  std::deque<std::pair<int64_t, int64_t>> out;
  int64_t taken = 0;
  for (int i = 0; i < 20000; ++i) {
    if (random() % 2 == 0 && !out.empty()) {
      ring.GiveBack();
      out.pop_front();
      continue;
    }
    const int64_t count = 1 + random() % kPages;
    const std::optional<int64_t> begin = ring.Take(count);
    EXPECT_TRUE(begin.has_value() || !out.empty()) << "an empty ring has room";
    if (!begin.has_value()) continue;
    ++taken;
    EXPECT_GE(*begin, 0);
    EXPECT_LE(*begin + count, kPages);
    for (const auto& [first, length] : out) {
      EXPECT_TRUE(*begin + count <= first || first + length <= *begin);
    }
    out.emplace_back(*begin, count);
  }
  EXPECT_GT(taken, 1000);
}

// Copies nothing before it is waited for: as late as a device may be.
class LateBackend : public testing::BackendWrapper {
 public:
  using BackendWrapper::BackendWrapper;

  absl::StatusOr<std::unique_ptr<PendingCopy>> CopyOut(absl::Span<const HostCopy> copies) override {
    class LateCopy : public PendingCopy {
     public:
      explicit LateCopy(absl::Span<const HostCopy> copies)
          : copies_(copies.begin(), copies.end()) {}
      bool Ready() override { return false; }
      absl::Status Wait() override {
        for (const HostCopy& c : copies_) std::memcpy(c.to, c.from, static_cast<size_t>(c.bytes));
        return absl::OkStatus();
      }

     private:
      const std::vector<HostCopy> copies_;
    };
    return std::make_unique<LateCopy>(copies);
  }
};

class CopyOutFp8Test : public ::testing::Test {
 protected:
  static constexpr int64_t kPages = 24;

  void SetUp() override {
    BackendOptions options;
    options.dtype = ComputeDType::kF32;
    ASSERT_OK_AND_ASSIGN(auto inner, MakeBackend(options));
    backend_ = std::make_unique<LateBackend>(std::move(inner));
    config_.num_layers = 3;
    config_.heads = {.num_heads = 2, .num_kv_heads = 2, .head_dim = 16};
    geometry_ = {.num_layers = 3, .heads = config_.heads, .dtype = DType::kF32, .chunk_pages = 2};
    ASSERT_OK_AND_ASSIGN(kv_, KvCache::Create(config_, kPages, *backend_));
    ASSERT_OK_AND_ASSIGN(KvStaging staging,
                         KvStaging::Create(geometry_, /*max_rows=*/kBlockTokens, *backend_));
    copy_out_.emplace(kv_, std::move(staging), *backend_);
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    auto* values = static_cast<float*>(kv_.Layer(0).pages);
    const int64_t count = config_.num_layers * kPages * kv_.Layer(0).page_elements();
    for (int64_t i = 0; i < count; ++i) values[i] = normal(random);
    ASSERT_OK_AND_ASSIGN(auto memory, backend_->AllocateHost(host_bytes()));
    host_ = std::make_unique<HostPages>(std::move(memory), geometry_.chunk_bytes(), kChunks);
    for (int32_t page = kPages; page-- > 0;) pages_.push_back(page);
    shipment_ = NewShipment();
    ASSERT_OK_AND_ASSIGN(reader_, shipment_->Open(WholeKv(geometry_), 0));
  }
  std::shared_ptr<Shipment> NewShipment() const {
    return std::make_shared<Shipment>(geometry_.As(DType::kF8E4M3), Shipment::Keep::kUntilTaken,
                                      std::vector<KvPart>());
  }
  int64_t host_bytes() const { return kChunks * geometry_.chunk_bytes(); }

  // The pages of the pool in reverse, as one piece.
  Piece MakePiece(int64_t num_tokens) {
    Piece piece;
    piece.pages = pages_;
    piece.chunks = CutIntoChunks(0, num_tokens, /*skip_tokens=*/200, geometry_.chunk_pages);
    piece.host = host_->Take(static_cast<int64_t>(piece.chunks.size()) * config_.num_layers, 1);
    piece.shipment = shipment_;
    return piece;
  }

  // Fails the test where a page of the chunk is not what the reference makes of the cache's.
  void ExpectQuantised(const KvChunk& chunk) {
    const KvGeometry& shipped = shipment_->geometry();
    for (int64_t p = 0; p < chunk.tokens.num_pages(); ++p) {
      const int64_t page = chunk.tokens.first_page() + p;
      const int64_t count = std::min(kBlockTokens, chunk.tokens.end() - page * kBlockTokens);
      const std::vector<uint8_t> expected =
          reference::QuantizePage(kv_.Layer(chunk.layer), pages_[page], count);
      const auto* got =
          reinterpret_cast<const uint8_t*>(chunk.memory->data()) + p * shipped.page_bytes();
      EXPECT_EQ(std::memcmp(got, expected.data(), shipped.scale_bytes()), 0) << page;
      for (int64_t at = shipped.scale_bytes(); at < shipped.page_bytes();
           at += kBlockTokens * config_.heads.head_dim) {
        EXPECT_EQ(std::memcmp(got + at, expected.data() + at, count * config_.heads.head_dim), 0)
            << "page " << page << " of layer " << chunk.layer;
      }
    }
  }

  // Fails the test where a chunk that has come is not right; how many have.
  int64_t CheckChunks(ShipmentReader& reader) {
    int64_t chunks = 0;
    ShipmentReader::Event event = reader.Next();
    while (const auto* chunk = std::get_if<ShipmentReader::Chunk>(&event)) {
      ExpectQuantised(chunk->chunk);
      ++chunks;
      event = reader.Next();
    }
    return chunks;
  }
  int64_t NumChunks(const Piece& piece) const {
    return static_cast<int64_t>(piece.chunks.size()) * config_.num_layers;
  }

  static constexpr int64_t kChunks = 3 * kPages / 2;
  ModelConfig config_;
  KvGeometry geometry_;
  std::unique_ptr<LateBackend> backend_;
  KvCache kv_;
  std::optional<CopyOut> copy_out_;
  std::vector<int32_t> pages_;
  std::unique_ptr<HostPages> host_;
  std::shared_ptr<Shipment> shipment_;
  std::unique_ptr<ShipmentReader> reader_;
};

// The piece has three times the pages that the staging memory holds.
TEST_F(CopyOutFp8Test, WaitsForRoomInsteadOfOverwriting) {
  constexpr int64_t kTokens = (kPages - 1) * kBlockTokens + 17;
  Piece piece = MakePiece(kTokens);
  PieceResult result;
  const OutgoingPiece outgoing{&piece, &result};
  for (int32_t layer = 0; layer < config_.num_layers; ++layer) {
    ASSERT_OK(copy_out_->Take(layer, {&outgoing, 1}, std::nullopt));
    ASSERT_OK(copy_out_->Publish(2));
  }
  ASSERT_OK(copy_out_->Publish(0));
  ASSERT_OK(result.status);
  EXPECT_EQ(CheckChunks(*reader_), NumChunks(piece));
  int64_t bytes = 0;
  for (const TokenRange& tokens : piece.chunks) {
    bytes += 3 * (tokens.count * 2 * 2 * 16 + tokens.num_pages() * 2 * 2 * 4);
  }
  EXPECT_EQ(reader_->kv_bytes(), bytes);
}

// Between two layers of a step all of another one are taken, while copies of the first are under
// way: neither overwrites what the other has staged.
TEST_F(CopyOutFp8Test, AStepInsideAnotherOverwritesNothing) {
  const std::shared_ptr<Shipment> urgent = NewShipment();
  ASSERT_OK_AND_ASSIGN(const auto urgent_reader, urgent->Open(WholeKv(geometry_), 0));
  Piece outer = MakePiece(9 * kBlockTokens + 5);
  Piece inner = MakePiece(5 * kBlockTokens);
  inner.shipment = urgent;
  PieceResult outer_result, inner_result;
  const OutgoingPiece outer_piece{&outer, &outer_result}, inner_piece{&inner, &inner_result};
  for (int32_t layer = 0; layer < config_.num_layers; ++layer) {
    ASSERT_OK(copy_out_->Take(layer, {&outer_piece, 1}, std::nullopt));
    if (layer != 1) continue;
    for (int32_t inside = 0; inside < config_.num_layers; ++inside) {
      ASSERT_OK(copy_out_->Take(inside, {&inner_piece, 1}, std::nullopt));
      ASSERT_OK(copy_out_->Publish(2));
    }
    ASSERT_OK(copy_out_->Publish(0));
    EXPECT_EQ(CheckChunks(*urgent_reader), NumChunks(inner));
  }
  ASSERT_OK(copy_out_->Publish(0));
  EXPECT_EQ(CheckChunks(*reader_), NumChunks(outer));
}

// What was given up leaves no run behind.
TEST_F(CopyOutFp8Test, AbandonedCopiesGiveTheirRoomBack) {
  for (int i = 0; i < 4; ++i) {
    Piece piece = MakePiece(4 * kBlockTokens);
    PieceResult result;
    const OutgoingPiece outgoing{&piece, &result};
    ASSERT_OK(copy_out_->Take(0, {&outgoing, 1}, std::nullopt));
    ASSERT_OK(copy_out_->Take(1, {&outgoing, 1}, std::nullopt));
    copy_out_->Abandon();
  }
  EXPECT_TRUE(std::holds_alternative<ShipmentReader::Waiting>(reader_->Next()));
}

}  // namespace
}  // namespace headstart
