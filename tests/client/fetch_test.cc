// Detached KV on several connections: how many, streams that break, streams that lie.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/synchronization/blocking_counter.h"
#include "absl/synchronization/mutex.h"
#include "client/grpc_status.h"
#include "client/prefill_client.h"
#include "tests/client/fetch_fixture.h"
#include "tests/testing/status_matchers.h"

namespace headstart {
namespace {

using ::testing::ElementsAre;
using testing::FakeServer;
using testing::FetchId;
using testing::FetchReaderWriter;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::IsSubsetOf;
using testing::KvStream;
using testing::PrefillWriter;
using testing::ReadAcks;
using testing::RichStatus;
using testing::StatusIs;
using testing::WriteFetch;
using testing::WriteStream;

const grpc::Status kBroken(grpc::StatusCode::UNAVAILABLE, "connection lost");

using FetchTest = testing::FetchTest;

TEST_F(FetchTest, ReceivesTheKvOnManyConnections) {
  for (const int connections : {2, 3, 8}) {
    options_.connections = connections;
    Serve();
    ASSERT_OK_AND_ASSIGN(const PrefillOutcome outcome, Prefill());
    EXPECT_EQ(received_, kv_);
    EXPECT_EQ(outcome.connections, connections);
    EXPECT_EQ(outcome.resumes, 0);
    EXPECT_EQ(outcome.completed.first_token().id(), 42);
    EXPECT_EQ(outcome.completed.num_chunks(), 24);
    EXPECT_EQ(outcome.completed.kv_bytes(), kv_.size());
    EXPECT_LE(outcome.timing.manifest, outcome.timing.first_chunk);
    EXPECT_LE(outcome.timing.first_chunk, outcome.timing.last_chunk);
    EXPECT_LE(outcome.timing.last_chunk, outcome.timing.completed);

    const std::vector<std::string> peers = server_->fetch_peers();
    EXPECT_EQ(peers.size(), connections);
    EXPECT_EQ(std::set<std::string>(peers.begin(), peers.end()).size(), connections);
    EXPECT_THAT(server_->released(), ElementsAre(FetchId()));
    const auto readers = server_->last_request().detached().readers();
    ASSERT_EQ(readers.size(), connections);
    for (int i = 0; i < connections; ++i) {
      EXPECT_EQ(readers[i].stripe_index(), i);
      EXPECT_EQ(readers[i].stripe_count(), connections);
    }
  }
}

TEST_F(FetchTest, OneConnectionIsThatOfPrefill) {
  options_.connections = 1;
  Serve();
  ASSERT_OK_AND_ASSIGN(const PrefillOutcome outcome, Prefill());
  EXPECT_EQ(received_, kv_);
  EXPECT_EQ(outcome.connections, 1);
  EXPECT_FALSE(server_->last_request().has_detached());
  EXPECT_THAT(server_->fetches(), IsEmpty());
  EXPECT_THAT(server_->released(), IsEmpty());
}

TEST_F(FetchTest, KeepsConnectionsForLaterCalls) {
  Serve();
  ASSERT_OK_AND_ASSIGN(const auto client, PrefillClient::Create(options_));
  ASSERT_OK(client->Prefill(request_, receive_));
  const std::vector<std::string> first = server_->fetch_peers();
  ASSERT_OK(client->Prefill(request_, receive_));
  const std::vector<std::string> both = server_->fetch_peers();
  ASSERT_EQ(both.size(), 4);
  EXPECT_THAT(std::vector<std::string>(both.begin() + 2, both.end()), IsSubsetOf(first));
}

TEST_F(FetchTest, OpensTheStreamsBeforeThePromptIsComputed) {
  absl::BlockingCounter fetching(2);
  server_ = std::make_unique<FakeServer>(
      [&](int, grpc::ServerContext&, PrefillWriter& writer) {
        WriteStream(detached_, writer, 1);
        fetching.Wait();
        WriteStream({detached_.begin() + 1, detached_.end()}, writer);
        return grpc::Status::OK;
      },
      [&](const v1::KvFetch& fetch, FetchReaderWriter& stream) {
        fetching.DecrementCount();
        return SendAll(fetch, stream);
      });
  options_.target = server_->target();
  EXPECT_OK(Prefill());
  EXPECT_EQ(received_, kv_);
}

// ---- how many

TEST(AutomaticConnectionsTest, OneForEvery32MiB) {
  constexpr int64_t kMiB = 1 << 20;
  EXPECT_EQ(AutomaticConnections(0, 8), 1);
  EXPECT_EQ(AutomaticConnections(-5 * kMiB, 8), 1);
  EXPECT_EQ(AutomaticConnections(32 * kMiB, 8), 1);
  EXPECT_EQ(AutomaticConnections(32 * kMiB + 1, 8), 2);
  EXPECT_EQ(AutomaticConnections(100 * kMiB, 8), 4);
  EXPECT_EQ(AutomaticConnections(int64_t{17} << 30, 8), 8);
  EXPECT_EQ(AutomaticConnections(int64_t{17} << 30, 1), 1);
}

TEST_F(FetchTest, AsksOnceHowLargeTheKvWillBe) {
  options_.connections = 0;
  options_.max_automatic_connections = 4;
  Serve();
  server_->set_kv_bytes_per_token((80 << 20) / 61);
  ASSERT_OK_AND_ASSIGN(const auto client, PrefillClient::Create(options_));
  for (int i = 0; i < 2; ++i) {
    ASSERT_OK_AND_ASSIGN(const PrefillOutcome outcome, client->Prefill(request_, receive_));
    EXPECT_EQ(outcome.connections, 3);
  }
  EXPECT_EQ(server_->num_model_infos(), 1);
}

TEST_F(FetchTest, SmallKvComesOnOneConnection) {
  options_.connections = 0;
  options_.max_automatic_connections = 4;
  Serve();
  server_->set_kv_bytes_per_token((30 << 20) / 61);
  ASSERT_OK_AND_ASSIGN(const PrefillOutcome outcome, Prefill());
  EXPECT_EQ(outcome.connections, 1);
  EXPECT_THAT(server_->fetches(), IsEmpty());
}

TEST_F(FetchTest, RefusesNumbersThatCanNotBe) {
  options_.target = "127.0.0.1:1";
  for (const int connections : {-1, 65}) {
    options_.connections = connections;
    EXPECT_THAT(Prefill(), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("connections")));
  }
}

// ---- streams that break

TEST_F(FetchTest, GoesOnWhereAStreamBroke) {
  Serve([this](const v1::KvFetch& fetch, FetchReaderWriter& stream) {
    if (fetch.part().stripe_index() == 0 || fetch.from_chunk() > 0) return SendAll(fetch, stream);
    WriteFetch(StreamFor(fetch), fetch, stream, 4);  // of 12
    return kBroken;
  });
  ASSERT_OK_AND_ASSIGN(const PrefillOutcome outcome, Prefill());
  EXPECT_EQ(received_, kv_);
  EXPECT_EQ(outcome.resumes, 1);
  EXPECT_EQ(outcome.attempts, 1);
  EXPECT_EQ(server_->num_calls(), 1) << "nothing is computed again";
  EXPECT_THAT(FetchedFrom(0), ElementsAre(0));
  EXPECT_THAT(FetchedFrom(1), ElementsAre(0, 4));
}

TEST_F(FetchTest, GoesOnWhenOnlyTheEndIsMissing) {
  Serve([this](const v1::KvFetch& fetch, FetchReaderWriter& stream) {
    if (fetch.from_chunk() > 0) return SendAll(fetch, stream);
    WriteFetch(StreamFor(fetch), fetch, stream, 12);
    return kBroken;
  });
  ASSERT_OK_AND_ASSIGN(const PrefillOutcome outcome, Prefill());
  EXPECT_EQ(received_, kv_);
  EXPECT_EQ(outcome.resumes, 2);
}

TEST_F(FetchTest, ABrokenStreamMayBreakAgainAfterEveryChunk) {
  options_.retry.max_attempts = 2;
  Serve([this](const v1::KvFetch& fetch, FetchReaderWriter& stream) {
    if (fetch.from_chunk() == 12) return SendAll(fetch, stream);
    WriteFetch(StreamFor(fetch), fetch, stream, 1);
    return kBroken;
  });
  ASSERT_OK_AND_ASSIGN(const PrefillOutcome outcome, Prefill());
  EXPECT_EQ(received_, kv_);
  EXPECT_EQ(outcome.resumes, 24);
}

TEST_F(FetchTest, GivesUpWhenABrokenStreamBringsNothingMore) {
  Serve([this](const v1::KvFetch& fetch, FetchReaderWriter& stream) {
    if (fetch.part().stripe_index() == 0) return SendAll(fetch, stream);
    if (fetch.from_chunk() == 0) WriteFetch(StreamFor(fetch), fetch, stream, 4);
    return kBroken;
  });
  EXPECT_THAT(Prefill(), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("connection lost")));
  EXPECT_EQ(server_->num_calls(), 1);
  EXPECT_THAT(FetchedFrom(1), ElementsAre(0, 4, 4));
  EXPECT_THAT(server_->released(), ElementsAre(FetchId()));
}

TEST_F(FetchTest, AsksForThePromptAgainWhenNoChunkHasCome) {
  Serve([](const v1::KvFetch&, FetchReaderWriter&) { return kBroken; });
  EXPECT_THAT(Prefill(), StatusIs(absl::StatusCode::kUnavailable));
  EXPECT_EQ(server_->num_calls(), 3);
  EXPECT_THAT(server_->released(), ElementsAre(FetchId(), FetchId(), FetchId()));
}

TEST_F(FetchTest, DoesNotGoOnAfterTheServersOwnWord) {
  Serve([this](const v1::KvFetch& fetch, FetchReaderWriter& stream) {
    if (fetch.from_chunk() > 0) return RichStatus(grpc::StatusCode::OUT_OF_RANGE, "KV_GONE");
    WriteFetch(StreamFor(fetch), fetch, stream, 4);
    return kBroken;
  });
  const absl::Status status = Prefill().status();
  EXPECT_THAT(status, StatusIs(absl::StatusCode::kOutOfRange));
  EXPECT_EQ(ErrorReasonOf(status), "KV_GONE");
  EXPECT_EQ(server_->num_calls(), 1);
}

TEST_F(FetchTest, TheStreamOfPrefillMayBreakWhenTheKvComes) {
  detached_.resize(1);
  prefill_status_ = kBroken;
  Serve();
  ASSERT_OK_AND_ASSIGN(const PrefillOutcome outcome, Prefill());
  EXPECT_EQ(received_, kv_);
  EXPECT_EQ(outcome.completed.first_token().id(), 42);
  EXPECT_EQ(server_->num_calls(), 1);
}

// ---- streams that lie

TEST_F(FetchTest, FindsWrongBytes) {
  ServeDamaged([](KvStream& stream) { stream[3].mutable_chunk()->mutable_data()->at(7) ^= 1; });
  EXPECT_THAT(Prefill(), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("crc32c")));
  EXPECT_THAT(server_->released(), ElementsAre(FetchId()));
}

TEST_F(FetchTest, FindsAnotherManifest) {
  ServeDamaged([](KvStream& stream) {
    stream[0].mutable_manifest()->mutable_layout()->mutable_rope()->set_theta(5);
  });
  EXPECT_THAT(Prefill(), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("another stream")));
}

TEST_F(FetchTest, FindsAChunkThatIsMissing) {
  ServeDamaged([](KvStream& stream) { stream.erase(stream.begin() + 3); });
  EXPECT_THAT(Prefill(), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("expected index 2")));
}

TEST_F(FetchTest, FindsAChunkThatCameTwice) {
  ServeDamaged([](KvStream& stream) { stream.insert(stream.begin() + 3, stream[3]); });
  EXPECT_THAT(Prefill(), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("expected index 3")));
}

TEST_F(FetchTest, FindsTheSameStripeTwice) {
  Serve([this](v1::KvFetch fetch, FetchReaderWriter& stream) {
    fetch.mutable_part()->set_stripe_index(0);
    return SendAll(fetch, stream);
  });
  EXPECT_THAT(Prefill(), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("came before")));
}

TEST_F(FetchTest, FindsAStreamThatEndsEarly) {
  Serve([this](const v1::KvFetch& fetch, FetchReaderWriter& stream) {
    WriteFetch(StreamFor(fetch), fetch, stream, 12);
    return grpc::Status::OK;
  });
  EXPECT_THAT(Prefill(), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("without `completed`")));
}

// ---- acknowledgements

TEST_F(FetchTest, AcknowledgesEverythingInTheEnd) {
  absl::Mutex mutex;
  std::vector<std::vector<uint32_t>> acks(2);
  Serve([&](const v1::KvFetch& fetch, FetchReaderWriter& stream) {
    WriteFetch(StreamFor(fetch), fetch, stream);
    std::vector<uint32_t> got = ReadAcks(stream);
    absl::MutexLock lock(&mutex);
    acks[fetch.part().stripe_index()] = std::move(got);
    return grpc::Status::OK;
  });
  ASSERT_OK(Prefill());
  for (const std::vector<uint32_t>& got : acks) {
    ASSERT_FALSE(got.empty());
    EXPECT_TRUE(std::is_sorted(got.begin(), got.end()));
    EXPECT_EQ(got.back(), 12);
  }
}

TEST_F(FetchTest, AServerMayWaitForEveryAcknowledgement) {
  Serve([this](const v1::KvFetch& fetch, FetchReaderWriter& stream) {
    for (const v1::PrefillResponse& message : StreamFor(fetch)) {
      stream.Write(message);
      v1::FetchKvRequest ack;
      while (message.has_chunk() && ack.ack().num_chunks() != message.chunk().index() + 1) {
        if (!stream.Read(&ack)) return grpc::Status(grpc::StatusCode::INTERNAL, "no ack");
      }
    }
    ReadAcks(stream);
    return grpc::Status::OK;
  });
  EXPECT_OK(Prefill());
  EXPECT_EQ(received_, kv_);
}

}  // namespace
}  // namespace headstart
