// When memory goes back, how shipments end, and who is woken.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "engine/error.h"
#include "engine/ship/shipment.h"
#include "tests/engine/ship/shipment_fixture.h"

namespace headstart {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using testing::StatusIs;

// ---- when memory goes back

TEST_F(ShipmentTest, TakenChunksGoBackWithTheReadersRef) {
  const auto shipment = Make(Keep::kUntilTaken);
  const auto reader = Open(*shipment, WholeKv(kGeometry));
  PublishPiece(*shipment, 0, 1);
  EXPECT_EQ(shipment->kept_chunks(), 4);
  {
    const ShipmentReader::Event on_the_wire = reader->Next();
    EXPECT_EQ(shipment->kept_chunks(), 3);
    EXPECT_EQ(held(), 4);
  }
  EXPECT_EQ(held(), 3);
}

TEST_F(ShipmentTest, ChunkOnTheWireOutlivesShipmentAndReader) {
  auto shipment = Make(Keep::kUntilTaken);
  auto reader = Open(*shipment, WholeKv(kGeometry));
  PublishPiece(*shipment, 0, 1);
  ShipmentReader::Event on_the_wire = reader->Next();
  reader.reset();
  shipment.reset();
  EXPECT_EQ(held(), 1);
  on_the_wire = ShipmentReader::Waiting{};
  EXPECT_EQ(held(), 0);
}

TEST_F(ShipmentTest, ReadingKeepsWhatIsKeptUntilClosed) {
  const auto shipment = Make(Keep::kUntilClosed);
  PublishPiece(*shipment, 0, 1);
  const auto reader = Open(*shipment, WholeKv(kGeometry));
  ReadAll(*reader);
  ASSERT_OK(reader->Acknowledge(4));
  EXPECT_EQ(held(), 4);
  EXPECT_OK(shipment->Open(WholeKv(kGeometry), 0));
}

TEST_F(ShipmentTest, ChunkGoesBackWhenEveryReaderThatHasItAcknowledged) {
  // Layers 0 and 1 are for both heads' readers and for the stripes', the others for the heads'.
  const std::vector<KvPart> readers = {Heads(0, 1), Heads(1, 1), Stripe(Layers(0, 2), 0, 2),
                                       Stripe(Layers(0, 2), 1, 2)};
  const auto shipment = Make(Keep::kUntilAcknowledged, readers);
  PublishPiece(*shipment, 0, 1);
  std::vector<std::unique_ptr<ShipmentReader>> open;
  for (const KvPart& part : readers) {
    open.push_back(Open(*shipment, part));
    ReadAll(*open.back());
  }
  ASSERT_OK(open[0]->Acknowledge(4));
  ASSERT_OK(open[1]->Acknowledge(3));
  EXPECT_EQ(held(), 3);  // layer 2
  ASSERT_OK(open[3]->Acknowledge(1));
  EXPECT_EQ(held(), 2);  // layer 1
  ASSERT_OK(open[2]->Acknowledge(1));
  EXPECT_EQ(held(), 1);  // layer 0
  EXPECT_EQ(shipment->kept_chunks(), 1);
  ASSERT_OK(open[1]->Acknowledge(4));
  EXPECT_EQ(held(), 0);
}

TEST_F(ShipmentTest, AcknowledgedChunkStaysWhileItIsOnAWire) {
  const auto shipment = Make(Keep::kUntilAcknowledged, {WholeKv(kGeometry)});
  const auto reader = Open(*shipment, WholeKv(kGeometry));
  shipment->Publish(NewChunk(0, 0));
  std::optional<ShipmentReader::Event> on_the_wire = reader->Next();
  ASSERT_OK(reader->Acknowledge(1));
  EXPECT_EQ(shipment->kept_chunks(), 0);
  EXPECT_EQ(held(), 1);
  on_the_wire.reset();
  EXPECT_EQ(held(), 0);
}

TEST_F(ShipmentTest, OpeningAcknowledgesWhatLiesBefore) {
  const auto shipment = Make(Keep::kUntilAcknowledged, {WholeKv(kGeometry)});
  PublishPiece(*shipment, 0, 1);
  ReadAll(*Open(*shipment, WholeKv(kGeometry)));
  EXPECT_EQ(held(), 4);
  const auto resumed = Open(*shipment, WholeKv(kGeometry), 3);
  EXPECT_EQ(held(), 1);
  EXPECT_THAT(ReadAll(*resumed), ElementsAre(Name(3, 0)));
}

TEST_F(ShipmentTest, UnannouncedReaderFreesNothing) {
  const auto shipment = Make(Keep::kUntilAcknowledged, {Heads(0, 1), Heads(1, 1)});
  PublishPiece(*shipment, 0, 1);
  const auto reader = Open(*shipment, WholeKv(kGeometry));
  ReadAll(*reader);
  ASSERT_OK(reader->Acknowledge(4));
  EXPECT_EQ(held(), 4);
}

TEST_F(ShipmentTest, RefusesAcknowledgementsThatGoBackOrAhead) {
  const auto shipment = Make(Keep::kUntilAcknowledged, {WholeKv(kGeometry)});
  PublishPiece(*shipment, 0, 2);
  const auto reader = Open(*shipment, WholeKv(kGeometry));
  for (int i = 0; i < 3; ++i) reader->Next();
  ASSERT_OK(reader->Acknowledge(2));
  for (const int64_t count : {-1, 1, 4}) {
    EXPECT_THAT(reader->Acknowledge(count),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("is not in [2, 3]")));
  }
  ASSERT_OK(reader->Acknowledge(2));
  ASSERT_OK(reader->Acknowledge(3));
  EXPECT_EQ(held(), 5);
}

// ---- the end

TEST_F(ShipmentTest, CloseEndsReadersAndGivesEverythingBack) {
  for (const Keep keep : {Keep::kUntilTaken, Keep::kUntilAcknowledged, Keep::kUntilClosed}) {
    const auto shipment = Make(keep, {WholeKv(kGeometry)});
    const auto reader = Open(*shipment, WholeKv(kGeometry));
    PublishPiece(*shipment, 0, 1);
    reader->Next();
    shipment->Close(absl::AbortedError("why"));
    EXPECT_EQ(held(), 0);
    EXPECT_EQ(shipment->kept_chunks(), 0);
    EXPECT_THAT(EndOf(*reader), StatusIs(absl::StatusCode::kAborted, HasSubstr("why")));
    EXPECT_THAT(shipment->Open(WholeKv(kGeometry), 0), StatusIs(absl::StatusCode::kAborted));
  }
}

TEST_F(ShipmentTest, NothingIsKeptAfterClose) {
  const auto shipment = Make(Keep::kUntilClosed);
  shipment->Close(absl::AbortedError("first"));
  shipment->Publish(NewChunk(0, 0));
  shipment->Complete({});
  shipment->Close(absl::InternalError("second"));
  EXPECT_EQ(held(), 0);
  EXPECT_THAT(shipment->Open(WholeKv(kGeometry), 0), StatusIs(absl::StatusCode::kAborted));
}

TEST_F(ShipmentTest, CloseAfterCompleteEndsThoseWhoHaveNotSeenTheEnd) {
  const auto shipment = Make(Keep::kUntilClosed);
  const auto reader = Open(*shipment, WholeKv(kGeometry));
  PublishPiece(*shipment, 0, 1);
  shipment->Complete({});
  shipment->Close(absl::AbortedError("released"));
  EXPECT_THAT(EndOf(*reader), StatusIs(absl::StatusCode::kAborted));
  EXPECT_EQ(held(), 0);
}

TEST_F(ShipmentTest, FirstResultCounts) {
  const auto shipment = Make(Keep::kUntilClosed);
  shipment->Complete(WithToken(1));
  shipment->Complete(WithToken(2));
  const ShipmentReader::Event event = Open(*shipment, std::nullopt)->Next();
  EXPECT_EQ(std::get<ShipmentReader::Ended>(event).result->first_token.id, 1);
}

TEST_F(ShipmentTest, ReaderOfNothingSeesStartAndEnd) {
  const auto shipment = Make(Keep::kUntilClosed);
  const auto reader = Open(*shipment, std::nullopt);
  shipment->Start();
  EXPECT_TRUE(std::holds_alternative<ShipmentReader::Started>(reader->Next()));
  PublishPiece(*shipment, 0, 1);
  EXPECT_TRUE(IsWaiting(reader->Next()));
  shipment->Complete({});
  EXPECT_OK(EndOf(*reader));
  EXPECT_EQ(reader->num_chunks(), 0);
  EXPECT_EQ(reader->kv_bytes(), 0);
}

TEST_F(ShipmentTest, ReaderOfNothingKeepsItsOutcomeWhateverBecomesOfTheKv) {
  const auto shipment = Make(Keep::kUntilClosed);
  const auto computed = Open(*shipment, std::nullopt);
  const auto kv = Open(*shipment, WholeKv(kGeometry));
  EXPECT_FALSE(computed->computed());
  shipment->Complete({});
  EXPECT_TRUE(computed->computed());
  shipment->Close(absl::AbortedError("released"));
  EXPECT_OK(EndOf(*computed));
  EXPECT_THAT(EndOf(*kv), StatusIs(absl::StatusCode::kAborted));
  const auto failed = Make(Keep::kUntilClosed);
  const auto outcome = Open(*failed, std::nullopt);
  failed->Close(absl::AbortedError("failed"));
  EXPECT_THAT(EndOf(*outcome), StatusIs(absl::StatusCode::kAborted));
  EXPECT_FALSE(outcome->computed());
}

TEST_F(ShipmentTest, ReadersHaveTheManifest) {
  const auto shipment =
      std::make_shared<Shipment>(kGeometry, Keep::kUntilClosed, std::vector<KvPart>(), "manifest");
  EXPECT_EQ(Open(*shipment, std::nullopt)->manifest(), "manifest");
}

// ---- waking

TEST_F(ShipmentTest, WakesOnceAfterEveryWait) {
  const auto shipment = Make(Keep::kUntilTaken);
  const auto reader = Open(*shipment, WholeKv(kGeometry));
  int woken = 0;
  reader->WakeWith([&] { ++woken; });
  shipment->Start();
  EXPECT_EQ(woken, 0);  // nobody waited
  ReadAll(*reader);
  PublishPiece(*shipment, 0, 1);
  EXPECT_EQ(woken, 1);
  ReadAll(*reader);
  shipment->Complete({});
  EXPECT_EQ(woken, 2);
}

TEST_F(ShipmentTest, WakesOnlyThoseWhoHaveSomething) {
  const auto shipment = Make(Keep::kUntilClosed);
  const std::vector<std::optional<KvPart>> parts = {std::nullopt, Layers(1, 1),
                                                    Stripe(Layers(0, 4), 1, 2)};
  std::vector<std::unique_ptr<ShipmentReader>> readers;
  std::vector<int> woken(parts.size());
  for (size_t i = 0; i < parts.size(); ++i) {
    readers.push_back(Open(*shipment, parts[i]));
    readers[i]->WakeWith([&woken, i] { ++woken[i]; });
    readers[i]->Next();
  }
  shipment->Publish(NewChunk(0, 0));
  EXPECT_THAT(woken, ElementsAre(0, 0, 0));
  shipment->Publish(NewChunk(0, 1));
  EXPECT_THAT(woken, ElementsAre(0, 0, 1));
  shipment->Publish(NewChunk(1, 0));
  EXPECT_THAT(woken, ElementsAre(0, 1, 1));
  shipment->Complete({});
  EXPECT_THAT(woken, ElementsAre(1, 1, 1));
}

// Who has a chunk on a wire that does not move must hear of it, too.
TEST_F(ShipmentTest, CloseWakesEveryReaderOnce) {
  const auto shipment = Make(Keep::kUntilTaken);
  const auto waits = Open(*shipment, WholeKv(kGeometry)), sends = Open(*shipment, std::nullopt);
  int waiting_woken = 0, sending_woken = 0;
  waits->WakeWith([&] { ++waiting_woken; });
  sends->WakeWith([&] { ++sending_woken; });
  waits->Next();
  shipment->Close(absl::AbortedError("over"));
  shipment->Close(absl::AbortedError("again"));
  EXPECT_EQ(waiting_woken, 1);
  EXPECT_EQ(sending_woken, 1);
}

TEST_F(ShipmentTest, ReaderThatWentWhileItWaitedIsNotWoken) {
  const auto shipment = Make(Keep::kUntilClosed);
  auto reader = Open(*shipment, WholeKv(kGeometry));
  int woken = 0;
  reader->WakeWith([&] { ++woken; });
  reader->Next();
  reader.reset();
  shipment->Start();
  shipment->Close(absl::AbortedError("over"));
  EXPECT_EQ(woken, 0);
}

}  // namespace
}  // namespace headstart
