// How detached KV ends that is not simply fetched and released, and that nothing of it stays
// (checked after each test).
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/base/instant.h"
#include "tests/server/fetching.h"
#include "tests/server/raw_call.h"
#include "tests/testing/status_matchers.h"

namespace headstart::testing {
namespace {

constexpr absl::Duration kFreedWithin = absl::Seconds(1);

// A chunk of 128 tokens for each of the four layers, piece after piece.
class FetchEndTest : public ServerTest {
 protected:
  FetchEndTest() {
    model_.num_layers = 4;
    model_.max_positions = 8192;
    options_.piece_tokens = 128;
    options_.host_kv_bytes = 256 << 20;  // a chunk has 1 MiB at hand and holds 64 KiB
  }

  std::string Compute(const v1::PrefillRequest& request) {
    const CallResult result = Run(request);
    EXPECT_TRUE(result.status.ok()) << result.status.error_message();
    return result.responses.empty() ? "" : result.responses[0].accepted().fetch_id();
  }

  grpc::Status Renew(const std::string& fetch_id) const {
    grpc::ClientContext context;
    v1::RenewLeaseRequest request;
    request.set_fetch_id(fetch_id);
    v1::RenewLeaseResponse response;
    return NewStub()->RenewLease(&context, request, &response);
  }
  grpc::Status Release(const std::string& fetch_id) const {
    grpc::ClientContext context;
    v1::ReleaseKvRequest request;
    request.set_fetch_id(fetch_id);
    v1::ReleaseKvResponse response;
    return NewStub()->ReleaseKv(&context, request, &response);
  }
  CallResult Fetch(const std::string& fetch_id) const {
    const auto stub = NewStub();
    return OpenFetch(stub.get(), fetch_id, {}).Finish();
  }

  static v1::PrefillRequest WithLease(v1::PrefillRequest request, absl::Duration lease) {
    auto* out = request.mutable_detached()->mutable_lease();
    out->set_seconds(absl::ToInt64Seconds(lease));
    out->set_nanos(static_cast<int32_t>(absl::ToInt64Nanoseconds(lease % absl::Seconds(1))));
    return request;
  }

  void ExpectEnded(const CallResult& result, grpc::StatusCode code, const std::string& reason) {
    EXPECT_EQ(result.status.error_code(), code) << result.status.error_message();
    EXPECT_EQ(result.reason(), reason);
  }
};

// ---- lease

TEST_F(FetchEndTest, LeaseThatNobodyRenewsEnds) {
  Start();
  const std::string fetch_id = Compute(WithLease(DetachedPrompt(300), absl::Milliseconds(200)));
  EXPECT_TRUE(BecomesIdle(absl::Seconds(1.2))) << WhatIsLeft();
  EXPECT_EQ(Metric("headstart_kv_leases_expired_total{model=\"tiny\"}"), 1);
  ExpectEnded(Fetch(fetch_id), grpc::StatusCode::NOT_FOUND, "UNKNOWN_FETCH_ID");
  EXPECT_EQ(Renew(fetch_id).error_code(), grpc::StatusCode::NOT_FOUND);
  EXPECT_EQ(Release(fetch_id).error_code(), grpc::StatusCode::NOT_FOUND);
}

TEST_F(FetchEndTest, RenewalKeepsTheKv) {
  Start();
  const absl::Duration lease = absl::Milliseconds(500);
  const std::string fetch_id = Compute(WithLease(DetachedPrompt(300), lease));
  EXPECT_EQ(Metric("headstart_kv_leases{model=\"tiny\"}"), 1);
  const Instant end = Instant::Now() + 3 * lease;
  while (Instant::Now() < end) {
    ASSERT_TRUE(Renew(fetch_id).ok());
    absl::SleepFor(lease / 10);
  }
  EXPECT_TRUE(Fetch(fetch_id).status.ok());
  EXPECT_TRUE(BecomesIdle(absl::Seconds(2))) << "no longer than a lease after the last fetch";
}

TEST_F(FetchEndTest, AcknowledgementsKeepTheKv) {
  Start();
  const absl::Duration lease = absl::Seconds(4);
  const std::string fetch_id = Compute(WithLease(DetachedPrompt(6000, {Stripe(0, 1)}), lease));
  const auto slow = NewSlowStub();
  OpenFetch fetch(slow.get(), fetch_id, Stripe(0, 1));
  v1::PrefillResponse response;
  while (fetch.num_chunks() < 60 && fetch.Read(&response)) {  // of 188
    if (fetch.num_chunks() % 20 != 0) continue;
    fetch.Acknowledge(fetch.num_chunks());
    absl::SleepFor(0.5 * lease);  // one and a half leases in all; a busy machine has the other half
  }
  EXPECT_TRUE(fetch.Finish().status.ok());
  EXPECT_TRUE(Release(fetch_id).ok());
}

TEST_F(FetchEndTest, LeaseThatEndsEndsItsFetches) {
  Start();
  const std::string fetch_id = Compute(WithLease(DetachedPrompt(6000), absl::Milliseconds(300)));
  const auto slow = NewSlowStub();
  OpenFetch fetch(slow.get(), fetch_id, {});
  EXPECT_TRUE(BecomesIdle(absl::Seconds(2))) << "although a write is in flight: " << WhatIsLeft();
  EXPECT_EQ(fetch.Finish().status.error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
}

// ---- release and cancel in flight

TEST_F(FetchEndTest, ReleaseEndsWhatIsBeingSent) {
  Start();
  const std::string fetch_id = Compute(DetachedPrompt(300));
  const std::string large_id = Compute(DetachedPrompt(6000));
  const auto slow = NewSlowStub();
  OpenFetch fetch(slow.get(), large_id, {});
  v1::PrefillResponse response;
  ASSERT_TRUE(fetch.Read(&response));
  EXPECT_TRUE(Release(large_id).ok());
  EXPECT_TRUE(Release(fetch_id).ok());
  EXPECT_TRUE(BecomesIdle(kFreedWithin)) << WhatIsLeft();
  EXPECT_EQ(fetch.Finish().status.error_code(), grpc::StatusCode::ABORTED);
  EXPECT_EQ(Metric("headstart_kv_fetches_total{code=\"ABORTED\",model=\"tiny\"}"), 1);
}

TEST_F(FetchEndTest, ReleaseCancelsWhatIsNotComputed) {
  Start();
  Barrier barrier(backend_, "Attention", 1);
  const auto stub = NewStub();
  OpenCall prefill(stub.get(), DetachedPrompt(1000));
  const std::string fetch_id = prefill.Read().accepted().fetch_id();
  OpenFetch fetch(stub.get(), fetch_id, {});
  v1::PrefillResponse response;
  EXPECT_TRUE(fetch.Read(&response) && response.has_manifest());
  barrier.WaitUntilReached();
  EXPECT_TRUE(Release(fetch_id).ok());
  ExpectEnded(prefill.Finish(), grpc::StatusCode::ABORTED, "KV_RELEASED");
  ExpectEnded(fetch.Finish(), grpc::StatusCode::ABORTED, "KV_RELEASED");
  const int64_t before = backend_->CountCalls("Attention");
  barrier.Open();
  EXPECT_TRUE(BecomesIdle(kFreedWithin)) << WhatIsLeft();
  EXPECT_EQ(backend_->CountCalls("Attention"), before) << "no further layer";
}

TEST_F(FetchEndTest, CancelOfPrefillEndsItsFetches) {
  Start();
  Barrier barrier(backend_, "Attention", 1);
  const auto stub = NewStub();
  OpenCall prefill(stub.get(), DetachedPrompt(1000));
  OpenFetch fetch(stub.get(), prefill.Read().accepted().fetch_id(), {});
  v1::PrefillResponse response;
  EXPECT_TRUE(fetch.Read(&response) && response.has_manifest());
  barrier.WaitUntilReached();
  prefill.context().TryCancel();
  prefill.Finish();
  ExpectEnded(fetch.Finish(), grpc::StatusCode::CANCELLED, "CLIENT_CANCELLED");
  barrier.Open();
  EXPECT_TRUE(BecomesIdle(kFreedWithin)) << WhatIsLeft();
}

TEST_F(FetchEndTest, CancelOfOneFetchLeavesTheOthers) {
  Start();
  const std::string fetch_id = Compute(DetachedPrompt(6000));
  const auto slow = NewSlowStub();
  OpenFetch cancelled(slow.get(), fetch_id, {});
  v1::PrefillResponse response;
  ASSERT_TRUE(cancelled.Read(&response));
  cancelled.context().TryCancel();
  EXPECT_TRUE(Fetch(fetch_id).status.ok());
  EXPECT_TRUE(Release(fetch_id).ok());
}

// What the prompt ended with is what its fetches end with.
TEST_F(FetchEndTest, PromptThatFailsEndsItsFetches) {
  Start();
  backend_->PoisonOutput("Embed", 0);
  Barrier barrier(backend_, "Embed", 0);
  const auto stub = NewStub();
  OpenCall prefill(stub.get(), DetachedPrompt(300));
  OpenFetch fetch(stub.get(), prefill.Read().accepted().fetch_id(), {});
  barrier.WaitUntilReached();
  v1::PrefillResponse response;
  EXPECT_TRUE(fetch.Read(&response) && response.has_manifest());
  barrier.Open();
  ExpectEnded(prefill.Finish(), grpc::StatusCode::INTERNAL, "NONFINITE_OUTPUT");
  ExpectEnded(fetch.Finish(), grpc::StatusCode::INTERNAL, "NONFINITE_OUTPUT");
}

// ---- slow readers

TEST_F(FetchEndTest, OneSlowReaderDoesNotHoldTheOthers) {
  Start();
  const std::string fetch_id = Compute(DetachedPrompt(6000));
  const auto slow_stub = NewSlowStub(), stub = NewStub();
  OpenFetch slow(slow_stub.get(), fetch_id, Stripe(0, 2));
  v1::PrefillResponse response;
  ASSERT_TRUE(slow.Read(&response));
  EXPECT_TRUE(OpenFetch(stub.get(), fetch_id, Stripe(1, 2)).Finish().status.ok());
  EXPECT_TRUE(slow.Finish().status.ok());
  EXPECT_TRUE(Release(fetch_id).ok());
}

TEST_F(FetchEndTest, ReaderThatStopsIsCutAndTheKvStays) {
  options_.write_stall_timeout = absl::Milliseconds(300);
  Start();
  const std::string fetch_id = Compute(DetachedPrompt(6000));
  const auto slow = NewSlowStub();
  OpenFetch stalled(slow.get(), fetch_id, {});
  EXPECT_TRUE(ComesTrue([this] {
    return Metric("headstart_kv_fetches_total{code=\"CANCELLED\",model=\"tiny\"}") == 1;
  }));
  EXPECT_EQ(stalled.Finish().status.error_code(), grpc::StatusCode::CANCELLED);
  EXPECT_TRUE(Fetch(fetch_id).status.ok());
  EXPECT_TRUE(Release(fetch_id).ok());
}

// Others wait for the host memory that it holds.
TEST_F(FetchEndTest, AnnouncedReaderThatNeverComesIsGivenUp) {
  options_.write_stall_timeout = absl::Milliseconds(300);
  options_.host_kv_bytes = 8 << 20;
  Start();
  const auto stub = NewStub();
  OpenCall held(stub.get(), DetachedPrompt(2000, {Stripe(0, 1)}));
  EXPECT_TRUE(held.Read().has_accepted());
  EXPECT_TRUE(Run(Prompt(100)).status.ok());
  ExpectEnded(held.Finish(), grpc::StatusCode::CANCELLED, "CLIENT_STALLED");
}

// ---- who may

TEST_F(FetchEndTest, UnknownIdsAreNotFound) {
  Start();
  for (const std::string& id : {std::string(), std::string("short"), std::string(16, 'x')}) {
    ExpectEnded(Fetch(id), grpc::StatusCode::NOT_FOUND, "UNKNOWN_FETCH_ID");
    EXPECT_EQ(Renew(id).error_code(), grpc::StatusCode::NOT_FOUND);
    EXPECT_EQ(Release(id).error_code(), grpc::StatusCode::NOT_FOUND);
  }
  EXPECT_EQ(Metric("headstart_kv_fetches_total{code=\"NOT_FOUND\",model=\"tiny\"}"), 3);
  EXPECT_EQ(Metric("headstart_kv_fetch_streams{model=\"tiny\"}"), 0);
}

TEST_F(FetchEndTest, IdOfReleasedKvIsUnknown) {
  Start();
  const std::string fetch_id = Compute(DetachedPrompt(10));
  EXPECT_TRUE(Release(fetch_id).ok());
  ExpectEnded(Fetch(fetch_id), grpc::StatusCode::NOT_FOUND, "UNKNOWN_FETCH_ID");
}

// ---- bad requests

TEST_F(FetchEndTest, RefusesPartsOutsideOfTheModel) {
  Start();
  const std::string fetch_id = Compute(DetachedPrompt(10));
  const auto stub = NewStub();
  const auto expect_refused = [&](auto set, const std::string& field) {
    v1::KvPart part;
    set(part);
    const CallResult result = OpenFetch(stub.get(), fetch_id, part).Finish();
    ExpectEnded(result, grpc::StatusCode::INVALID_ARGUMENT, "INVALID_FIELD");
    EXPECT_EQ(result.field(), field) << result.status.error_message();
  };
  expect_refused([](auto& p) { p.set_layer_begin(4); }, "fetch.part.layer_begin");
  expect_refused([](auto& p) { p.set_layer_count(5); }, "fetch.part.layer_begin");
  expect_refused([](auto& p) { p.set_kv_head_begin(2); }, "fetch.part.kv_head_begin");
  expect_refused([](auto& p) { p.set_kv_head_count(0xffffffffu); }, "fetch.part.kv_head_count");
  expect_refused([](auto& p) { p.set_stripe_index(1); }, "fetch.part.stripe_index");
  expect_refused([](auto& p) { p.set_stripe_count(65); }, "fetch.part.stripe_index");
  EXPECT_TRUE(Release(fetch_id).ok());
}

TEST_F(FetchEndTest, RefusesBadDetachedRequests) {
  Start();
  const auto expect_refused = [&](auto set, const std::string& field) {
    v1::PrefillRequest request = DetachedPrompt(10);
    set(*request.mutable_detached());
    const CallResult result = Run(request);
    ExpectEnded(result, grpc::StatusCode::INVALID_ARGUMENT, "INVALID_FIELD");
    EXPECT_EQ(result.field(), field) << result.status.error_message();
  };
  expect_refused([](auto& d) { d.mutable_lease()->set_seconds(-1); }, "detached.lease");
  expect_refused([](auto& d) { d.mutable_lease(); }, "detached.lease");
  expect_refused([](auto& d) { d.add_readers()->set_layer_begin(9); },
                 "detached.readers[0].layer_begin");
  expect_refused([](auto& d) { *d.add_readers() = Stripe(0, 2); }, "readers");
}

TEST_F(FetchEndTest, RefusesKvThatHostMemoryCanNotHold) {
  options_.host_kv_bytes = 16 << 20;
  Start();
  const CallResult never = Run(DetachedPrompt(6000));
  ExpectEnded(never, grpc::StatusCode::FAILED_PRECONDITION, "HOST_MEMORY_FULL");
  const std::string fetch_id = Compute(DetachedPrompt(300));  // 12 of 16 chunks, 4 stay free
  const CallResult later = Run(DetachedPrompt(300));
  ExpectEnded(later, grpc::StatusCode::RESOURCE_EXHAUSTED, "HOST_MEMORY_FULL");
  EXPECT_TRUE(later.has_retry_delay());
  EXPECT_TRUE(Run(Prompt(1000)).status.ok()) << "KV that flows goes on";
  EXPECT_TRUE(Release(fetch_id).ok());
}

TEST_F(FetchEndTest, RefusesCallsThatDoNotFetchFirst) {
  Start();
  v1::FetchKvRequest ack;
  ack.mutable_ack()->set_num_chunks(1);
  const auto channel = NewChannel();
  CallResult result = RawCall(channel, "FetchKv", {ack.SerializeAsString()});
  ExpectEnded(result, grpc::StatusCode::INVALID_ARGUMENT, "INVALID_FIELD");
  EXPECT_EQ(result.field(), "fetch");
  ExpectEnded(RawCall(channel, "FetchKv", {"\xff\xff\xff\xff"}), grpc::StatusCode::INVALID_ARGUMENT,
              "MALFORMED_REQUEST");
  ExpectEnded(RawCall(channel, "FetchKv", {}), grpc::StatusCode::INVALID_ARGUMENT,
              "MALFORMED_REQUEST");
}

TEST_F(FetchEndTest, RefusesAcknowledgementsThatGoBackOrBeyond) {
  Start();
  const std::string fetch_id = Compute(DetachedPrompt(6000));
  const auto refused_after = [&](const std::vector<uint32_t>& acks) {
    const auto slow = NewSlowStub();
    OpenFetch fetch(slow.get(), fetch_id, {});
    v1::PrefillResponse response;
    while (fetch.num_chunks() < 2 && fetch.Read(&response)) {
    }
    for (const uint32_t num_chunks : acks) fetch.Acknowledge(num_chunks);
    return fetch.Finish();
  };
  for (const auto& acks : {std::vector<uint32_t>{2, 1}, {100000}}) {
    const CallResult result = refused_after(acks);
    ExpectEnded(result, grpc::StatusCode::INVALID_ARGUMENT, "INVALID_FIELD");
    EXPECT_EQ(result.field(), "ack.num_chunks");
  }
  EXPECT_TRUE(Release(fetch_id).ok());
}

TEST_F(FetchEndTest, RefusesASecondFetchOnACall) {
  Start();
  Barrier barrier(backend_, "Attention", 1);
  const auto stub = NewStub();
  OpenCall prefill(stub.get(), DetachedPrompt(10));
  const std::string fetch_id = prefill.Read().accepted().fetch_id();
  barrier.WaitUntilReached();
  OpenFetch fetch(stub.get(), fetch_id, {});
  v1::FetchKvRequest again;
  again.mutable_fetch()->set_fetch_id(fetch_id);
  fetch.stream().Write(again);
  const CallResult result = fetch.Finish();
  ExpectEnded(result, grpc::StatusCode::INVALID_ARGUMENT, "INVALID_FIELD");
  EXPECT_EQ(result.field(), "ack");
  barrier.Open();
  EXPECT_TRUE(prefill.Finish().status.ok());
  EXPECT_TRUE(Release(fetch_id).ok());
}

// ---- the server

TEST_F(FetchEndTest, DrainWaitsForKvThatIsNotFetched) {
  Start();
  const std::string fetch_id = Compute(DetachedPrompt(300));
  server_->Drain();
  absl::Status ended = absl::UnknownError("not yet");
  std::thread end([this, &ended] {
    server_->WaitForEnd();
    ended = server_->Shutdown();
  });
  EXPECT_TRUE(Fetch(fetch_id).status.ok());
  EXPECT_TRUE(Release(fetch_id).ok());
  end.join();
  EXPECT_OK(ended);
}

TEST_F(FetchEndTest, DestroyedServerEndsFetches) {
  Start();
  const std::string fetch_id = Compute(DetachedPrompt(6000));
  const auto slow = NewSlowStub();
  OpenFetch fetch(slow.get(), fetch_id, {});
  v1::PrefillResponse response;
  ASSERT_TRUE(fetch.Read(&response));
  std::thread reader(
      [&] { EXPECT_EQ(fetch.Finish().status.error_code(), grpc::StatusCode::UNAVAILABLE); });
  server_.reset();
  reader.join();
}

}  // namespace
}  // namespace headstart::testing
