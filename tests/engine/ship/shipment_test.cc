// What readers see: order, parts, resuming.
#include "engine/ship/shipment.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "engine/error.h"
#include "tests/engine/ship/shipment_fixture.h"

namespace headstart {
namespace {

using ::testing::HasSubstr;
using testing::StatusIs;

// ---- order

TEST_F(ShipmentTest, ReaderSeesStartThenChunksInOrderThenTheResult) {
  const auto shipment = Make(Keep::kUntilTaken);
  const auto reader = Open(*shipment, WholeKv(kGeometry));
  EXPECT_TRUE(IsWaiting(reader->Next()));
  shipment->Start();
  shipment->Publish(NewChunk(0, 0));
  shipment->Publish(NewChunk(1, 0));
  EXPECT_TRUE(std::holds_alternative<ShipmentReader::Started>(reader->Next()));
  for (uint32_t i = 0; i < 2; ++i) {
    const ShipmentReader::Event event = reader->Next();
    const auto* chunk = std::get_if<ShipmentReader::Chunk>(&event);
    ASSERT_NE(chunk, nullptr);
    EXPECT_EQ(chunk->index, i);
    EXPECT_EQ(NameOf(chunk->chunk), Name(i, 0));
  }
  EXPECT_TRUE(IsWaiting(reader->Next()));
  shipment->Complete(WithToken(7));
  for (int i = 0; i < 2; ++i) {  // the end stays the end
    const ShipmentReader::Event event = reader->Next();
    const auto* ended = std::get_if<ShipmentReader::Ended>(&event);
    ASSERT_NE(ended, nullptr);
    EXPECT_OK(ended->status);
    EXPECT_EQ(ended->result->first_token.id, 7);
  }
}

TEST_F(ShipmentTest, LateReaderSeesTheSame) {
  const auto shipment = Make(Keep::kUntilClosed);
  shipment->Start();
  PublishPiece(*shipment, 0, 2);
  const auto early = Open(*shipment, WholeKv(kGeometry));
  shipment->Complete({});
  const auto late = Open(*shipment, WholeKv(kGeometry));
  EXPECT_TRUE(std::holds_alternative<ShipmentReader::Started>(late->Next()));
  EXPECT_EQ(ReadAll(*late), ReadAll(*early));
  EXPECT_EQ(late->num_chunks(), 2 * kLayers);
  EXPECT_OK(EndOf(*late));
}

TEST_F(ShipmentTest, StripesArePartsOfEverything) {
  const auto shipment = Make(Keep::kUntilClosed);
  PublishPiece(*shipment, 0, 3);
  PublishPiece(*shipment, 3, 2);
  shipment->Complete({});
  for (const KvPart& layers : {Layers(0, 4), Layers(1, 2), Layers(3, 1)}) {
    const std::vector<Name> all = ReadAll(*Open(*shipment, layers));
    EXPECT_EQ(all.size(), 5 * layers.layer_count);
    for (const int32_t stripes : {1, 2, 3, 8}) {
      for (int32_t i = 0; i < stripes; ++i) {
        std::vector<Name> expected;
        for (size_t k = i; k < all.size(); k += stripes) expected.push_back(all[k]);
        EXPECT_EQ(ReadAll(*Open(*shipment, Stripe(layers, i, stripes))), expected)
            << "stripe " << i << " of " << stripes;
      }
    }
  }
}

TEST_F(ShipmentTest, CountsTheBytesOfItsHeads) {
  const auto shipment = Make(Keep::kUntilClosed);
  PublishPiece(*shipment, 0, 3);
  const auto half = Open(*shipment, Heads(1, 1));
  ReadAll(*half);
  EXPECT_EQ(half->kv_bytes(), 3 * kLayers * kChunkTokens * kGeometry.token_bytes() / 2);
}

// ---- resume

TEST_F(ShipmentTest, ResumesAtAChunkOfThePart) {
  const auto shipment = Make(Keep::kUntilClosed);
  PublishPiece(*shipment, 0, 5);
  shipment->Complete({});
  const KvPart part = Stripe(Layers(1, 3), 1, 2);
  const std::vector<Name> all = ReadAll(*Open(*shipment, part));
  const auto whole = Open(*shipment, part);
  ReadAll(*whole);
  for (size_t from = 0; from <= all.size(); ++from) {
    const auto resumed = Open(*shipment, part, static_cast<int64_t>(from));
    EXPECT_EQ(resumed->num_chunks(), from);
    EXPECT_EQ(ReadAll(*resumed), std::vector<Name>(all.begin() + from, all.end()));
    // Those of the whole part.
    EXPECT_EQ(resumed->num_chunks(), whole->num_chunks());
    EXPECT_EQ(resumed->kv_bytes(), whole->kv_bytes());
    EXPECT_OK(EndOf(*resumed));
  }
}

TEST_F(ShipmentTest, ResumedIndexGoesOn) {
  const auto shipment = Make(Keep::kUntilClosed);
  PublishPiece(*shipment, 0, 2);
  const auto reader = Open(*shipment, WholeKv(kGeometry), 3);
  const ShipmentReader::Event event = reader->Next();
  EXPECT_EQ(std::get<ShipmentReader::Chunk>(event).index, 3);
}

TEST_F(ShipmentTest, CannotStartBehindWhatWasMade) {
  const auto shipment = Make(Keep::kUntilClosed);
  PublishPiece(*shipment, 0, 1);
  const absl::Status refused = shipment->Open(WholeKv(kGeometry), kLayers + 1).status();
  EXPECT_THAT(refused, StatusIs(absl::StatusCode::kOutOfRange, HasSubstr("not made yet")));
  EXPECT_EQ(ReasonOf(refused), ErrorReason::kKvGone);
  EXPECT_EQ(ReasonOf(shipment->Open(std::nullopt, 1).status()), ErrorReason::kKvGone);
}

TEST_F(ShipmentTest, CannotStartAtAChunkThatIsGone) {
  const auto shipment = Make(Keep::kUntilAcknowledged, {WholeKv(kGeometry)});
  PublishPiece(*shipment, 0, 1);
  const auto reader = Open(*shipment, WholeKv(kGeometry));
  ReadAll(*reader);
  ASSERT_OK(reader->Acknowledge(2));
  EXPECT_EQ(ReasonOf(shipment->Open(WholeKv(kGeometry), 1).status()), ErrorReason::kKvGone);
  EXPECT_OK(shipment->Open(WholeKv(kGeometry), 2));
}

TEST_F(ShipmentTest, ReaderThatFallsBehindWhatOthersAcknowledgedIsTold) {
  const auto shipment = Make(Keep::kUntilAcknowledged, {WholeKv(kGeometry)});
  PublishPiece(*shipment, 0, 1);
  const auto unannounced = Open(*shipment, Layers(0, 2));
  const auto announced = Open(*shipment, WholeKv(kGeometry));
  ReadAll(*announced);
  ASSERT_OK(announced->Acknowledge(1));
  EXPECT_EQ(ReasonOf(EndOf(*unannounced)), ErrorReason::kKvGone);
}

TEST_F(ShipmentTest, RefusesAPartOutsideOfTheModel) {
  const auto shipment = Make(Keep::kUntilClosed);
  EXPECT_THAT(shipment->Open(Layers(3, 2), 0), StatusIs(absl::StatusCode::kInvalidArgument));
}

}  // namespace
}  // namespace headstart
