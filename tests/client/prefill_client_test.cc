#include "client/prefill_client.h"

#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/synchronization/notification.h"
#include "client/grpc_status.h"
#include "google/protobuf/util/message_differencer.h"
#include "kernels/base/instant.h"
#include "tests/client/fake_server.h"
#include "tests/client/kv_stream.h"
#include "tests/testing/status_matchers.h"

namespace headstart {
namespace {

using testing::FakeServer;
using ::testing::HasSubstr;
using testing::KvStream;
using testing::KvStreamSpec;
using testing::PrefillWriter;
using testing::RichStatus;
using testing::StatusIs;
using testing::WriteStream;

class PrefillClientTest : public ::testing::Test {
 protected:
  PrefillClientTest()
      : request_(RequestFor(spec_)), kv_(MakeKv(spec_)), stream_(MakeStream(spec_, kv_)) {
    options_.timeout = absl::Seconds(20);
    options_.retry.initial_backoff = absl::Milliseconds(1);
    receive_.on_manifest = [this](const v1::KvManifest&, const KvShape& shape) {
      received_.assign(shape.total_bytes(), std::byte{0});
      return ContiguousKv(shape, absl::MakeSpan(received_));
    };
  }

  void Serve(FakeServer::Handler handler) {
    server_ = std::make_unique<FakeServer>(std::move(handler));
    options_.target = server_->target();
  }
  // The first `failures` calls send `before` messages and end with `status`; later ones are right.
  void ServeAfterFailures(int failures, int before, const grpc::Status& status) {
    Serve([=, this](int call, grpc::ServerContext&, PrefillWriter& writer) {
      WriteStream(stream_, writer, call <= failures ? before : -1);
      return call <= failures ? status : grpc::Status::OK;
    });
  }

  absl::StatusOr<PrefillOutcome> Prefill(CancelToken* cancel = nullptr) {
    auto client = PrefillClient::Create(options_);
    if (!client.ok()) return client.status();
    return (*client)->Prefill(request_, receive_, cancel);
  }

  const KvStreamSpec spec_;
  v1::PrefillRequest request_;
  const std::vector<std::byte> kv_;
  KvStream stream_;
  PrefillClientOptions options_;
  KvReceiverOptions receive_;
  std::vector<std::byte> received_;
  absl::Notification returned_;  // for handlers that wait for the client
  std::unique_ptr<FakeServer> server_;
};

const grpc::Status kUnavailable(grpc::StatusCode::UNAVAILABLE, "not now");

TEST_F(PrefillClientTest, ReceivesTheKvAndTheFirstToken) {
  ServeAfterFailures(0, 0, grpc::Status::OK);
  ASSERT_OK_AND_ASSIGN(const PrefillOutcome outcome, Prefill());
  EXPECT_EQ(received_, kv_);
  EXPECT_EQ(outcome.completed.first_token().id(), 42);
  EXPECT_EQ(outcome.accepted.request_id(), "r-1");
  EXPECT_EQ(outcome.attempts, 1);
  v1::PrefillRequest sent = server_->last_request();
  sent.clear_attempt_key();
  EXPECT_TRUE(google::protobuf::util::MessageDifferencer::Equals(sent, request_));
  EXPECT_GT(outcome.timing.accepted, absl::ZeroDuration());
  EXPECT_LE(outcome.timing.accepted, outcome.timing.manifest);
  EXPECT_LE(outcome.timing.manifest, outcome.timing.first_chunk);
  EXPECT_LE(outcome.timing.first_chunk, outcome.timing.last_chunk);
  EXPECT_LE(outcome.timing.last_chunk, outcome.timing.completed);
}

TEST_F(PrefillClientTest, ChecksTheTokenHashOfItsOwnPrompt) {
  ServeAfterFailures(0, 0, grpc::Status::OK);
  request_.set_token_ids(3, 999);
  EXPECT_THAT(Prefill(), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("token_hash")));
}

TEST_F(PrefillClientTest, ChecksThatExactMeansDense) {
  stream_[1].mutable_manifest()->mutable_attention()->set_algorithm(
      v1::AttentionProvenance::ALGORITHM_PROXY_ATTN);
  ServeAfterFailures(0, 0, grpc::Status::OK);
  request_.mutable_attention()->set_preset(v1::ATTENTION_PRESET_EXACT);
  EXPECT_THAT(Prefill(), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("dense")));
}

TEST_F(PrefillClientTest, EstimatesWithinTheTimeout) {
  ServeAfterFailures(0, 0, grpc::Status::OK);
  v1::EstimateResponse estimate;
  estimate.mutable_predicted_ttft()->set_nanos(5);
  estimate.set_refusal(v1::ERROR_REASON_QUEUE_FULL);
  server_->Answer(estimate);
  options_.timeout = absl::Milliseconds(12500);
  ASSERT_OK_AND_ASSIGN(const auto client, PrefillClient::Create(options_));
  v1::EstimateRequest request;
  *request.mutable_request() = request_;
  ASSERT_OK_AND_ASSIGN(const v1::EstimateResponse answer, client->Estimate(request));
  EXPECT_TRUE(google::protobuf::util::MessageDifferencer::Equals(answer, estimate));
  EXPECT_EQ(server_->last_estimate().request().token_ids_size(), request_.token_ids_size());
  EXPECT_EQ(server_->last_estimate().deadline().seconds(), 12);
  EXPECT_EQ(server_->last_estimate().deadline().nanos(), 500'000'000);
  request.mutable_deadline()->set_seconds(3);
  EXPECT_OK(client->Estimate(request));
  EXPECT_EQ(server_->last_estimate().deadline().seconds(), 3);
  EXPECT_EQ(server_->num_calls(), 0) << "nothing ran";
}

TEST_F(PrefillClientTest, GetsLoads) {
  ServeAfterFailures(0, 0, grpc::Status::OK);
  v1::GetLoadsResponse loads;
  loads.set_accepting(true);
  loads.set_queued_tokens(7);
  server_->Answer(loads);
  ASSERT_OK_AND_ASSIGN(const auto client, PrefillClient::Create(options_));
  ASSERT_OK_AND_ASSIGN(const v1::GetLoadsResponse answer, client->GetLoads());
  EXPECT_TRUE(google::protobuf::util::MessageDifferencer::Equals(answer, loads));
}

// ---- retries

TEST_F(PrefillClientTest, RetriesUnavailableBeforeTheFirstChunk) {
  for (const int messages_before : {0, 1, 2}) {
    ServeAfterFailures(2, messages_before, kUnavailable);
    ASSERT_OK_AND_ASSIGN(const PrefillOutcome outcome, Prefill());
    EXPECT_EQ(outcome.attempts, 3);
    EXPECT_EQ(server_->num_calls(), 3);
    EXPECT_EQ(received_, kv_);
  }
}

// By which the server knows an attempt that it has not missed yet from another request.
TEST_F(PrefillClientTest, AttemptsOfOneCallHaveAKeyInCommon) {
  ServeAfterFailures(1, 0, kUnavailable);
  ASSERT_OK(Prefill());
  ASSERT_OK(Prefill());
  const std::string key = server_->request(1).attempt_key();
  EXPECT_EQ(key.size(), 16u);
  EXPECT_EQ(server_->request(2).attempt_key(), key);
  EXPECT_EQ(server_->request(3).attempt_key().size(), 16u);
  EXPECT_NE(server_->request(3).attempt_key(), key) << "another call";
  request_.set_attempt_key("the caller's own");
  ASSERT_OK(Prefill());
  EXPECT_EQ(server_->last_request().attempt_key(), "the caller's own");
}

TEST_F(PrefillClientTest, GivesUpAfterMaxAttempts) {
  ServeAfterFailures(100, 0, kUnavailable);
  EXPECT_THAT(Prefill(), StatusIs(absl::StatusCode::kUnavailable, HasSubstr("not now")));
  EXPECT_EQ(server_->num_calls(), 3);
}

TEST_F(PrefillClientTest, DoesNotRetryAfterAChunk) {
  ServeAfterFailures(1, 3, kUnavailable);
  EXPECT_THAT(Prefill(), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("broke after 1 chunks")));
  EXPECT_EQ(server_->num_calls(), 1);
}

TEST_F(PrefillClientTest, KeepsTheServersOwnErrorAfterAChunk) {
  ServeAfterFailures(1, 3, RichStatus(grpc::StatusCode::INTERNAL, "NONFINITE_OUTPUT"));
  const absl::Status status = Prefill().status();
  EXPECT_THAT(status, StatusIs(absl::StatusCode::kInternal));
  EXPECT_EQ(ErrorReasonOf(status), "NONFINITE_OUTPUT");
}

TEST_F(PrefillClientTest, DoesNotRetryOtherErrors) {
  for (const auto code :
       {grpc::StatusCode::INVALID_ARGUMENT, grpc::StatusCode::RESOURCE_EXHAUSTED,
        grpc::StatusCode::INTERNAL, grpc::StatusCode::ABORTED, grpc::StatusCode::NOT_FOUND}) {
    ServeAfterFailures(1, 0, RichStatus(code, "QUEUE_FULL", absl::ZeroDuration()));
    EXPECT_THAT(Prefill(), StatusIs(static_cast<absl::StatusCode>(code)));
    EXPECT_EQ(server_->num_calls(), 1);
  }
}

TEST_F(PrefillClientTest, RetriesAFullQueueWhereWanted) {
  options_.retry.when_queue_full = true;
  ServeAfterFailures(
      1, 0, RichStatus(grpc::StatusCode::RESOURCE_EXHAUSTED, "QUEUE_FULL", absl::Milliseconds(1)));
  EXPECT_OK(Prefill());
  ServeAfterFailures(
      1, 0,
      RichStatus(grpc::StatusCode::RESOURCE_EXHAUSTED, "OUT_OF_MEMORY", absl::Milliseconds(1)));
  EXPECT_THAT(Prefill(), StatusIs(absl::StatusCode::kResourceExhausted));
}

TEST_F(PrefillClientTest, WaitsAsLongAsTheServerSays) {
  ServeAfterFailures(
      1, 0, RichStatus(grpc::StatusCode::UNAVAILABLE, "DRAINING", absl::Milliseconds(300)));
  const Instant start = Instant::Now();
  EXPECT_OK(Prefill());
  EXPECT_GE(Instant::Now() - start, absl::Milliseconds(300));
}

TEST_F(PrefillClientTest, TellsOfEveryPause) {
  ServeAfterFailures(2, 0,
                     RichStatus(grpc::StatusCode::UNAVAILABLE, "DRAINING", absl::Milliseconds(2)));
  int retries = 0;
  options_.retry.on_retry = [&](const absl::Status& why, absl::Duration pause) {
    ++retries;
    EXPECT_EQ(ErrorReasonOf(why), "DRAINING");
    EXPECT_EQ(pause, absl::Milliseconds(2));
  };
  EXPECT_OK(Prefill());
  EXPECT_EQ(retries, 2);
}

TEST_F(PrefillClientTest, DoesNotWaitPastItsDeadline) {
  ServeAfterFailures(1, 0,
                     RichStatus(grpc::StatusCode::UNAVAILABLE, "DRAINING", absl::Hours(1000000)));
  EXPECT_THAT(Prefill(), StatusIs(absl::StatusCode::kUnavailable));
  EXPECT_EQ(server_->num_calls(), 1);
}

TEST_F(PrefillClientTest, RetriesAServerThatIsNotThere) {
  ServeAfterFailures(0, 0, grpc::Status::OK);
  server_.reset();
  EXPECT_THAT(Prefill(), StatusIs(absl::StatusCode::kUnavailable));
}

// ---- cancel and deadline

TEST_F(PrefillClientTest, CancelsFromAnotherThread) {
  Serve([&](int, grpc::ServerContext&, PrefillWriter& writer) {
    WriteStream(stream_, writer, 3);
    returned_.WaitForNotification();
    return grpc::Status::OK;
  });
  CancelToken cancel;
  absl::Notification got_chunk;
  receive_.on_progress = [&](int64_t, int64_t) { got_chunk.Notify(); };
  std::thread canceller([&] {
    got_chunk.WaitForNotification();
    cancel.Cancel();
  });
  EXPECT_THAT(Prefill(&cancel), StatusIs(absl::StatusCode::kCancelled));
  returned_.Notify();
  canceller.join();
}

TEST_F(PrefillClientTest, DoesNotStartWhenCancelledBefore) {
  ServeAfterFailures(0, 0, grpc::Status::OK);
  CancelToken cancel;
  cancel.Cancel();
  EXPECT_THAT(Prefill(&cancel), StatusIs(absl::StatusCode::kCancelled));
  EXPECT_EQ(server_->num_calls(), 0);
}

TEST_F(PrefillClientTest, CancelEndsThePauseBetweenAttempts) {
  CancelToken cancel;
  options_.timeout = absl::Hours(1);
  std::thread canceller;
  Serve([&](int, grpc::ServerContext&, PrefillWriter&) {
    canceller = std::thread([&] { cancel.Cancel(); });
    return RichStatus(grpc::StatusCode::UNAVAILABLE, "DRAINING", absl::Minutes(50));
  });
  EXPECT_THAT(Prefill(&cancel), StatusIs(absl::StatusCode::kCancelled));
  server_.reset();
  canceller.join();
}

TEST_F(PrefillClientTest, EndsAtItsDeadline) {
  Serve([&](int, grpc::ServerContext&, PrefillWriter& writer) {
    WriteStream(stream_, writer, 3);
    returned_.WaitForNotification();
    return grpc::Status::OK;
  });
  options_.timeout = absl::Milliseconds(300);
  EXPECT_THAT(Prefill(), StatusIs(absl::StatusCode::kDeadlineExceeded));
  returned_.Notify();
}

TEST_F(PrefillClientTest, ACallbackErrorCancelsTheCallOnTheServer) {
  bool write_failed = false;
  Serve([&](int, grpc::ServerContext&, PrefillWriter& writer) {
    WriteStream(stream_, writer, 3);
    returned_.WaitForNotification();
    while (writer.Write(stream_[3])) {
    }
    write_failed = true;
    return grpc::Status::OK;
  });
  receive_.on_manifest = [](const v1::KvManifest&,
                            const KvShape&) -> absl::StatusOr<KvDestination> {
    return absl::ResourceExhaustedError("no room");
  };
  EXPECT_THAT(Prefill(), StatusIs(absl::StatusCode::kResourceExhausted, "no room"));
  returned_.Notify();
  server_.reset();
  EXPECT_TRUE(write_failed);
}

// ---- hostile servers

TEST_F(PrefillClientTest, AStreamThatEndsEarlyIsDataLoss) {
  for (int messages = 0; messages < static_cast<int>(stream_.size()); ++messages) {
    ServeAfterFailures(1, messages, grpc::Status::OK);
    EXPECT_THAT(Prefill(), StatusIs(absl::StatusCode::kDataLoss)) << messages;
    EXPECT_EQ(server_->num_calls(), 1);
  }
}

TEST_F(PrefillClientTest, AnErrorAfterCompletedIsAnError) {
  ServeAfterFailures(1, -1, RichStatus(grpc::StatusCode::INTERNAL, "INTERNAL"));
  EXPECT_THAT(Prefill(), StatusIs(absl::StatusCode::kInternal));
}

TEST_F(PrefillClientTest, DoesNotInflateCompressedMessages) {
  Serve([&](int, grpc::ServerContext& context, PrefillWriter& writer) {
    context.set_compression_algorithm(GRPC_COMPRESS_GZIP);
    v1::PrefillResponse bomb = stream_[0];
    bomb.mutable_accepted()->set_transfer_params(std::string(1 << 20, 'x'));
    writer.Write(bomb);
    return grpc::Status::OK;
  });
  EXPECT_THAT(Prefill(), StatusIs(absl::StatusCode::kDataLoss));
}

TEST_F(PrefillClientTest, RefusesMessagesBeyondItsLimit) {
  options_.max_message_bytes = 100;
  ServeAfterFailures(0, 0, grpc::Status::OK);
  EXPECT_THAT(Prefill(),
              StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("larger than max")));
}

// ---- channel

TEST_F(PrefillClientTest, CallsTakeTurnsAndAvoidServersThatDrain) {
  const auto handler = [this](int, grpc::ServerContext&, PrefillWriter& writer) {
    WriteStream(stream_, writer);
    return grpc::Status::OK;
  };
  FakeServer first(handler), second(handler);
  options_.target = "ipv4:" + first.target() + "," + second.target();
  options_.wait_for_ready = true;
  ASSERT_OK_AND_ASSIGN(auto client, PrefillClient::Create(options_));
  while (first.num_calls() == 0 || second.num_calls() == 0)
    ASSERT_OK(client->Prefill(request_, receive_));
  first.SetServing(false);
  int64_t in_a_row = 0;  // the news takes a while to arrive
  while (in_a_row < 10) {
    const int before = second.num_calls();
    ASSERT_OK(client->Prefill(request_, receive_));
    in_a_row = second.num_calls() > before ? in_a_row + 1 : 0;
  }
}

TEST_F(PrefillClientTest, NamesATlsFileThatItCanNotRead) {
  options_.target = "127.0.0.1:1";
  options_.tls.enabled = true;
  options_.tls.ca_file = "/nowhere/ca.pem";
  EXPECT_THAT(PrefillClient::Create(options_),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("/nowhere/ca.pem")));
}

TEST_F(PrefillClientTest, WantsCertificateAndKeyTogether) {
  options_.target = "127.0.0.1:1";
  options_.tls.enabled = true;
  options_.tls.cert_file = "/nowhere/cert.pem";
  EXPECT_THAT(PrefillClient::Create(options_),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("key")));
}

TEST_F(PrefillClientTest, WantsATargetAndAFiniteTimeout) {
  EXPECT_THAT(PrefillClient::Create(options_),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("target")));
  options_.target = "127.0.0.1:1";
  options_.timeout = absl::InfiniteDuration();
  EXPECT_THAT(PrefillClient::Create(options_),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("timeout")));
}

// ---- error details

TEST(GrpcStatusTest, KeepsCodeMessageAndDetails) {
  const absl::Status status = ToAbslStatus(
      RichStatus(grpc::StatusCode::RESOURCE_EXHAUSTED, "QUEUE_FULL", absl::Milliseconds(1500)));
  EXPECT_THAT(status, StatusIs(absl::StatusCode::kResourceExhausted, "server says no"));
  EXPECT_EQ(ErrorReasonOf(status), "QUEUE_FULL");
  EXPECT_EQ(RetryDelayOf(status), absl::Milliseconds(1500));
  EXPECT_EQ(DescribeStatus(status),
            "RESOURCE_EXHAUSTED (QUEUE_FULL): server says no; retry in 1.5s");
}

TEST(GrpcStatusTest, DoesNotTrustTheDetails) {
  const absl::Status garbage =
      ToAbslStatus(grpc::Status(grpc::StatusCode::ABORTED, "a\x1b[2J", "\xff\xff\xff"));
  EXPECT_THAT(garbage, StatusIs(absl::StatusCode::kAborted));
  EXPECT_EQ(ErrorReasonOf(garbage), "");
  EXPECT_EQ(DescribeStatus(garbage), "ABORTED: a\\033[2J");
  const absl::Status negative =
      ToAbslStatus(RichStatus(grpc::StatusCode::ABORTED, "X", absl::Seconds(-5)));
  EXPECT_EQ(RetryDelayOf(negative), absl::ZeroDuration());
}

TEST(GrpcStatusTest, OkIsOk) { EXPECT_OK(ToAbslStatus(grpc::Status::OK)); }

}  // namespace
}  // namespace headstart
