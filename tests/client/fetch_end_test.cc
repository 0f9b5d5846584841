// Detached KV on several connections: where it is fetched from, how it ends, and ranks that fetch
// what somebody else asked for.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <string>
#include <thread>
#include <vector>

#include "absl/synchronization/blocking_counter.h"
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
using testing::PrefillWriter;
using testing::ReadAcks;
using testing::RichStatus;
using testing::StatusIs;
using testing::WriteFetch;
using testing::WriteStream;

class FetchEndTest : public testing::FetchTest {};

// ---- where from

TEST_F(FetchEndTest, DoesNotFollowTheServerToAHostThatIsNotAllowed) {
  detached_[0].mutable_accepted()->set_fetch_address("evil.example:8443");
  Serve();
  EXPECT_THAT(Prefill(),
              StatusIs(absl::StatusCode::kPermissionDenied, HasSubstr("evil.example:8443")));
  EXPECT_THAT(server_->fetches(), IsEmpty());
  EXPECT_THAT(server_->released(), ElementsAre(FetchId()));
}

TEST_F(FetchEndTest, FetchesFromTheAddressThatTheServerNames) {
  FakeServer other([](int, grpc::ServerContext&, PrefillWriter&) { return grpc::Status::OK; },
                   [this](const v1::KvFetch& fetch, FetchReaderWriter& stream) {
                     return SendAll(fetch, stream);
                   });
  detached_[0].mutable_accepted()->set_fetch_address(other.target());
  Serve();
  EXPECT_OK(Prefill());
  EXPECT_EQ(received_, kv_);
  EXPECT_THAT(server_->fetches(), IsEmpty());
  EXPECT_THAT(server_->released(), IsEmpty());
  EXPECT_EQ(other.fetches().size(), 2);
  EXPECT_THAT(other.released(), ElementsAre(FetchId()));
}

TEST_F(FetchEndTest, FetchesFromTheServerThatAcceptedWhereThereAreSeveral) {
  const auto prefill = [this](int, grpc::ServerContext&, PrefillWriter& writer) {
    WriteStream(detached_, writer);
    return grpc::Status::OK;
  };
  const auto fetch = [this](const v1::KvFetch& asked, FetchReaderWriter& stream) {
    return SendAll(asked, stream);
  };
  FakeServer first(prefill, fetch), second(prefill, fetch);
  options_.target = "ipv4:" + first.target() + "," + second.target();
  options_.wait_for_ready = true;
  ASSERT_OK_AND_ASSIGN(const auto client, PrefillClient::Create(options_));
  while (first.num_calls() == 0 || second.num_calls() == 0)
    ASSERT_OK(client->Prefill(request_, receive_));
  for (const FakeServer* server : {&first, &second}) {
    EXPECT_EQ(server->fetches().size(), 2 * server->num_calls());
    EXPECT_EQ(server->released().size(), server->num_calls());
  }
}

// ---- ends

TEST_F(FetchEndTest, CancelEndsAllStreams) {
  absl::BlockingCounter fetching(2);
  std::atomic<int> ended{0};
  Serve([&](const v1::KvFetch& fetch, FetchReaderWriter& stream) {
    WriteFetch(StreamFor(fetch), fetch, stream, 4);
    fetching.DecrementCount();
    ReadAcks(stream);  // until the call is cancelled
    ++ended;
    return grpc::Status::OK;
  });
  CancelToken cancel;
  std::thread canceller([&] {
    fetching.Wait();
    cancel.Cancel();
  });
  EXPECT_THAT(Prefill(&cancel), StatusIs(absl::StatusCode::kCancelled));
  canceller.join();
  EXPECT_THAT(server_->released(), ElementsAre(FetchId()));
  server_.reset();
  EXPECT_EQ(ended, 2);
}

TEST_F(FetchEndTest, CancelEndsThePauseBeforeAStreamGoesOn) {
  options_.timeout = absl::Hours(1);
  CancelToken cancel;
  std::thread canceller;
  Serve([&](const v1::KvFetch& fetch, FetchReaderWriter& stream) {
    if (fetch.part().stripe_index() == 0) return SendAll(fetch, stream);
    canceller = std::thread([&] { cancel.Cancel(); });
    return RichStatus(grpc::StatusCode::UNAVAILABLE, "LOADING", absl::Minutes(50));
  });
  EXPECT_THAT(Prefill(&cancel), StatusIs(absl::StatusCode::kCancelled));
  server_.reset();
  canceller.join();
}

TEST_F(FetchEndTest, TheTimeoutEndsAllStreams) {
  options_.timeout = absl::Seconds(1);
  Serve([&](const v1::KvFetch& fetch, FetchReaderWriter& stream) {
    WriteFetch(StreamFor(fetch), fetch, stream, 4);
    ReadAcks(stream);
    return grpc::Status::OK;
  });
  EXPECT_THAT(Prefill(), StatusIs(absl::StatusCode::kDeadlineExceeded));
  EXPECT_THAT(server_->released(), ElementsAre(FetchId()));
}

TEST_F(FetchEndTest, AnErrorOfACallbackEndsAllStreams) {
  receive_.on_layer = [](int64_t) { return absl::UnavailableError("the cache is gone"); };
  Serve();
  EXPECT_THAT(Prefill(), StatusIs(absl::StatusCode::kUnavailable, "the cache is gone"));
  EXPECT_EQ(server_->num_calls(), 1);
  EXPECT_THAT(server_->released(), ElementsAre(FetchId()));
}

TEST_F(FetchEndTest, AnErrorOfOnAcceptedReleasesTheKv) {
  receive_.on_accepted = [](const v1::Accepted&) { return absl::AbortedError("changed my mind"); };
  Serve();
  EXPECT_THAT(Prefill(), StatusIs(absl::StatusCode::kAborted, "changed my mind"));
  EXPECT_THAT(server_->fetches(), IsEmpty());
  EXPECT_THAT(server_->released(), ElementsAre(FetchId()));
}

TEST_F(FetchEndTest, TheErrorOfThePromptCountsNotThatOfItsFetches) {
  detached_.resize(1);
  prefill_status_ = RichStatus(grpc::StatusCode::INTERNAL, "NONFINITE_OUTPUT");
  Serve([](const v1::KvFetch&, FetchReaderWriter& stream) {
    ReadAcks(stream);
    return grpc::Status::OK;
  });
  const absl::Status status = Prefill().status();
  EXPECT_THAT(status, StatusIs(absl::StatusCode::kInternal));
  EXPECT_EQ(ErrorReasonOf(status), "NONFINITE_OUTPUT");
}

TEST_F(FetchEndTest, CallbacksAreCalledOneAtATime) {
  options_.connections = 8;
  std::atomic<int> inside{0};
  std::vector<int64_t> layers;
  int64_t last = 0;
  receive_.on_progress = [&](int64_t done, int64_t) {
    EXPECT_EQ(++inside, 1);
    EXPECT_GT(done, last);
    last = done;
    std::this_thread::yield();
    --inside;
  };
  receive_.on_layer = [&](int64_t layer) {
    EXPECT_EQ(++inside, 1);
    layers.push_back(layer);
    --inside;
    return absl::OkStatus();
  };
  Serve();
  ASSERT_OK(Prefill().status());
  EXPECT_EQ(last, static_cast<int64_t>(kv_.size()));
  EXPECT_THAT(layers, ::testing::UnorderedElementsAre(0, 1, 2));
}

// ---- detached by hand: decode nodes whose ranks are processes of their own

TEST_F(FetchEndTest, ARequestThatIsDetachedIsOnlySent) {
  v1::PrefillRequest request = request_;
  request.mutable_detached()->mutable_lease()->set_seconds(60);
  std::string fetch_id;
  receive_.on_accepted = [&](const v1::Accepted& accepted) {
    fetch_id = accepted.fetch_id();
    return absl::OkStatus();
  };
  Serve();
  ASSERT_OK_AND_ASSIGN(const auto client, PrefillClient::Create(options_));
  ASSERT_OK_AND_ASSIGN(const PrefillOutcome outcome, client->Prefill(request, receive_));
  EXPECT_EQ(fetch_id, FetchId());
  EXPECT_EQ(outcome.completed.first_token().id(), 42);
  EXPECT_EQ(outcome.timing.first_chunk, absl::ZeroDuration());
  EXPECT_TRUE(received_.empty()) << "no memory is asked for";
  EXPECT_EQ(server_->last_request().detached().lease().seconds(), 60);
  EXPECT_THAT(server_->fetches(), IsEmpty());
  EXPECT_THAT(server_->released(), IsEmpty());
}

TEST_F(FetchEndTest, RanksFetchTheirHeads) {
  Serve();
  for (uint32_t rank = 0; rank < 2; ++rank) {
    v1::KvPart heads;
    heads.set_kv_head_begin(rank);
    heads.set_kv_head_count(1);
    ASSERT_OK_AND_ASSIGN(const auto client, PrefillClient::Create(options_));
    ASSERT_OK_AND_ASSIGN(const FetchOutcome outcome,
                         client->Fetch({.fetch_id = FetchId(), .fetch_address = server_->target()},
                                       heads, 3, receive_));
    EXPECT_EQ(received_, PartOf(spec_, kv_, heads));
    EXPECT_EQ(outcome.completed.kv_bytes(), kv_.size() / 2);
    EXPECT_EQ(outcome.completed.first_token().id(), 42);
  }
  EXPECT_EQ(server_->fetches().size(), 6);
  for (const v1::KvFetch& fetch : server_->fetches()) EXPECT_EQ(fetch.fetch_id(), FetchId());
  EXPECT_EQ(server_->num_calls(), 0);
  EXPECT_THAT(server_->released(), IsEmpty()) << "others may still fetch";
}

TEST_F(FetchEndTest, FetchGivesTheServersError) {
  Serve([](const v1::KvFetch&, FetchReaderWriter&) {
    return RichStatus(grpc::StatusCode::NOT_FOUND, "UNKNOWN_FETCH_ID");
  });
  ASSERT_OK_AND_ASSIGN(const auto client, PrefillClient::Create(options_));
  const absl::Status status = client->Fetch({.fetch_id = FetchId()}, {}, 2, receive_).status();
  EXPECT_THAT(status, StatusIs(absl::StatusCode::kNotFound));
  EXPECT_EQ(ErrorReasonOf(status), "UNKNOWN_FETCH_ID");
}

TEST_F(FetchEndTest, FetchChecksWhatItIsAskedFor) {
  Serve();
  ASSERT_OK_AND_ASSIGN(const auto client, PrefillClient::Create(options_));
  const KvLocation here{.fetch_id = FetchId()};
  for (const int stripes : {0, 65}) {
    EXPECT_THAT(client->Fetch(here, {}, stripes, receive_),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("num_stripes")));
  }
  EXPECT_THAT(client->Fetch(here, StripesOf({}, 2)[1], 1, receive_),
              StatusIs(absl::StatusCode::kInvalidArgument));
  EXPECT_THAT(client->Fetch({.fetch_id = FetchId(), .fetch_address = "evil:1"}, {}, 1, receive_),
              StatusIs(absl::StatusCode::kPermissionDenied, HasSubstr("evil")));
  EXPECT_THAT(server_->fetches(), IsEmpty());
}

TEST_F(FetchEndTest, RenewsAndReleasesALease) {
  Serve();
  ASSERT_OK_AND_ASSIGN(const auto client, PrefillClient::Create(options_));
  const KvLocation here{.fetch_id = FetchId()};
  ASSERT_OK_AND_ASSIGN(const absl::Duration lease, client->RenewLease(here));
  EXPECT_EQ(lease, absl::Milliseconds(7500));
  EXPECT_OK(client->ReleaseKv(here));
  EXPECT_THAT(server_->renewed(), ElementsAre(FetchId()));
  EXPECT_THAT(server_->released(), ElementsAre(FetchId()));
}

}  // namespace
}  // namespace headstart
