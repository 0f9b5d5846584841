// Estimate and GetLoads: what a router asks before it sends a prompt.
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <vector>

#include "tests/server/fetching.h"
#include "tests/testing/status_matchers.h"

namespace headstart::testing {
namespace {

int64_t Nanoseconds(const google::protobuf::Duration& d) {
  return d.seconds() * 1000000000 + d.nanos();
}

class EstimateTest : public ServerTest {
 protected:
  struct Estimated {
    CallResult call;  // without responses
    v1::EstimateResponse answer;
  };
  Estimated Ask(const v1::EstimateRequest& request) {
    Estimated result;
    grpc::ClientContext context;
    result.call.status = NewStub()->Estimate(&context, request, &result.answer);
    return result;
  }
  v1::EstimateResponse Estimate(const v1::EstimateRequest& request) {
    const Estimated result = Ask(request);
    EXPECT_TRUE(result.call.status.ok()) << result.call.status.error_message();
    return result.answer;
  }
  static v1::EstimateRequest For(const v1::PrefillRequest& prompt) {
    v1::EstimateRequest request;
    *request.mutable_request() = prompt;
    return request;
  }
  static v1::EstimateRequest ForLength(uint32_t num_tokens) {
    v1::EstimateRequest request;
    request.set_num_tokens(num_tokens);
    return request;
  }

  v1::GetLoadsResponse Loads() {
    grpc::ClientContext context;
    v1::GetLoadsResponse loads;
    const grpc::Status status = NewStub()->GetLoads(&context, {}, &loads);
    EXPECT_TRUE(status.ok()) << status.error_message();
    return loads;
  }

  // Lets the server see how fast it is: as many steps as it wants before it says anything.
  void LetItLearn() {
    for (int64_t i = 0; i < 4; ++i) {
      v1::PrefillRequest prompt = Prompt(300);
      prompt.set_prefix_reuse(v1::PREFIX_REUSE_NONE);
      EXPECT_TRUE(Run(prompt).status.ok());
    }
  }

  // A prompt before which none other comes.
  static v1::PrefillRequest First(int64_t count) {
    v1::PrefillRequest prompt = Prompt(count);
    prompt.set_priority(100);
    return prompt;
  }
};

// ---- Estimate

TEST_F(EstimateTest, SaysNothingOfTimesBeforeItKnows) {
  Start();
  const v1::EstimateResponse estimate = Estimate(For(Prompt(300)));
  EXPECT_EQ(estimate.ByteSizeLong(), 0u) << estimate.ShortDebugString();
}

TEST_F(EstimateTest, PredictsOnceItHasLearned) {
  Start();
  LetItLearn();
  const v1::EstimateResponse shorter = Estimate(For(Prompt(200)));
  ASSERT_TRUE(shorter.has_predicted_ttft());
  EXPECT_GT(Nanoseconds(shorter.predicted_compute()), 0);
  EXPECT_EQ(Nanoseconds(shorter.predicted_queue()), 0) << "nothing is in";
  EXPECT_EQ(Nanoseconds(shorter.predicted_ttft()), Nanoseconds(shorter.predicted_compute()));
  EXPECT_EQ(shorter.refusal(), v1::ERROR_REASON_UNSPECIFIED);
  const v1::EstimateResponse longer = Estimate(ForLength(2000));
  EXPECT_GT(Nanoseconds(longer.predicted_ttft()), Nanoseconds(shorter.predicted_ttft()));
  const v1::Accepted accepted = Run(Prompt(200)).responses.front().accepted();
  EXPECT_TRUE(accepted.has_predicted_ttft());
}

TEST_F(EstimateTest, AcceptedAndCompletedRepeatThePrediction) {
  Start();
  const CallResult unknown = Run(Prompt(300));
  EXPECT_FALSE(unknown.responses.front().accepted().has_predicted_ttft());
  EXPECT_FALSE(CompletedOf(unknown.responses.back()).statistics().has_predicted());
  LetItLearn();
  const CallResult known = Run(Prompt(300));
  EXPECT_EQ(Nanoseconds(known.responses.front().accepted().predicted_ttft()),
            Nanoseconds(CompletedOf(known.responses.back()).statistics().predicted()));
  EXPECT_GT(Nanoseconds(known.responses.front().accepted().predicted_ttft()), 0);
}

TEST_F(EstimateTest, CountsWhatIsCached) {
  Start();
  LetItLearn();
  const v1::EstimateResponse anew = Estimate(For(Prompt(2000)));
  EXPECT_EQ(anew.cached_tokens(), 0u);
  EXPECT_TRUE(Run(Prompt(2000)).status.ok());
  const v1::EstimateResponse hit = Estimate(For(Prompt(2000)));
  EXPECT_EQ(hit.cached_tokens(), 1920u);
  v1::PrefillRequest salted = Prompt(2000);
  salted.set_cache_salt("other");
  EXPECT_EQ(Estimate(For(salted)).cached_tokens(), 0u);
  EXPECT_EQ(Estimate(ForLength(2000)).cached_tokens(), 0u) << "nobody knows which tokens";
  EXPECT_LT(Nanoseconds(hit.predicted_compute()),
            Nanoseconds(Estimate(For(salted)).predicted_compute()));
}

TEST_F(EstimateTest, CountsWhoIsAhead) {
  Start();
  LetItLearn();
  Barrier barrier(backend_, "Attention", 0);
  const auto stub = NewStub();
  OpenCall running(stub.get(), First(300));
  barrier.WaitUntilReached();
  OpenCall queued(stub.get(), First(20));
  WaitForQueued(1);
  const v1::EstimateResponse estimate = Estimate(For(Prompt(30)));
  EXPECT_EQ(estimate.queue_requests(), 2u);
  EXPECT_EQ(estimate.queue_tokens(), 320u);
  EXPECT_GT(Nanoseconds(estimate.predicted_queue()), 0);
  EXPECT_NEAR(Nanoseconds(estimate.predicted_ttft()),
              Nanoseconds(estimate.predicted_queue()) + Nanoseconds(estimate.predicted_compute()),
              1);
  EXPECT_EQ(server_->Snapshot().load.inflight_requests, 2) << "an estimate takes no place";
  barrier.Open();
  EXPECT_TRUE(running.Finish().status.ok());
  EXPECT_TRUE(queued.Finish().status.ok());
}

TEST_F(EstimateTest, SaysThatTheQueueIsFull) {
  options_.max_queue_requests = 1;
  Start();
  Barrier barrier(backend_, "Attention", 0);
  const auto stub = NewStub();
  OpenCall running(stub.get(), Prompt(10));
  barrier.WaitUntilReached();
  const v1::EstimateResponse estimate = Estimate(For(Prompt(10)));
  EXPECT_EQ(estimate.refusal(), v1::ERROR_REASON_QUEUE_FULL);
  EXPECT_GT(Nanoseconds(estimate.retry_after()), 0);
  barrier.Open();
  EXPECT_TRUE(running.Finish().status.ok());
  EXPECT_EQ(Estimate(For(Prompt(10))).refusal(), v1::ERROR_REASON_UNSPECIFIED);
}

TEST_F(EstimateTest, SaysThatADeadlineIsOutOfReach) {
  Start();
  v1::EstimateRequest request = For(Prompt(2000));
  request.mutable_deadline()->set_nanos(10000);
  EXPECT_EQ(Estimate(request).refusal(), v1::ERROR_REASON_UNSPECIFIED) << "nothing is known";
  LetItLearn();
  const v1::EstimateResponse never = Estimate(request);
  EXPECT_EQ(never.refusal(), v1::ERROR_REASON_DEADLINE_UNREACHABLE);
  EXPECT_FALSE(never.has_retry_after()) << "at any time";
  EXPECT_TRUE(never.has_predicted_ttft());
  request.mutable_deadline()->set_seconds(60);
  EXPECT_EQ(Estimate(request).refusal(), v1::ERROR_REASON_UNSPECIFIED);
}

TEST_F(EstimateTest, SaysWhenToComeBackWhereOnlyTheQueueIsTooLong) {
  Start();
  LetItLearn();
  Barrier barrier(backend_, "Attention", 0);
  const auto stub = NewStub();
  OpenCall running(stub.get(), First(10));
  barrier.WaitUntilReached();
  std::vector<std::unique_ptr<OpenCall>> queued;
  for (int i = 0; i < 4; ++i) {
    v1::PrefillRequest prompt = First(2000);
    prompt.set_token_ids(0, static_cast<uint32_t>(i));  // nothing that they share
    queued.push_back(std::make_unique<OpenCall>(stub.get(), prompt));
  }
  WaitForQueued(4);
  const v1::EstimateResponse alone = Estimate(ForLength(2000));
  v1::EstimateRequest request = ForLength(2000);
  const int64_t between =
      Nanoseconds(alone.predicted_compute()) * 2 + Nanoseconds(alone.predicted_queue()) / 4;
  request.mutable_deadline()->set_seconds(between / 1000000000);
  request.mutable_deadline()->set_nanos(static_cast<int32_t>(between % 1000000000));
  const v1::EstimateResponse later = Estimate(request);
  EXPECT_EQ(later.refusal(), v1::ERROR_REASON_DEADLINE_UNREACHABLE);
  EXPECT_GT(Nanoseconds(later.retry_after()), 0);
  barrier.Open();
  EXPECT_TRUE(running.Finish().status.ok());
  for (const auto& call : queued) EXPECT_TRUE(call->Finish().status.ok());
}

TEST_F(EstimateTest, SaysThatTheServerDrains) {
  Start();
  Barrier barrier(backend_, "Attention", 0);
  const auto stub = NewStub();
  OpenCall running(stub.get(), Prompt(10));
  barrier.WaitUntilReached();
  EXPECT_TRUE(Loads().accepting());
  server_->Drain();
  EXPECT_EQ(Estimate(For(Prompt(10))).refusal(), v1::ERROR_REASON_DRAINING);
  EXPECT_FALSE(Loads().accepting());
  barrier.Open();
  EXPECT_TRUE(running.Finish().status.ok());
}

TEST_F(EstimateTest, RefusesWhatPrefillRefuses) {
  options_.kv_pool_tokens = 1024;
  Start();
  const auto expect_refused = [this](const v1::EstimateRequest& request, grpc::StatusCode code,
                                     const std::string& reason, const std::string& field) {
    const CallResult result = Ask(request).call;
    EXPECT_EQ(result.status.error_code(), code) << result.status.error_message();
    EXPECT_EQ(result.reason(), reason);
    EXPECT_EQ(result.field(), field) << result.status.error_message();
  };
  const auto expect_invalid = [&](const v1::EstimateRequest& request, const std::string& field) {
    expect_refused(request, grpc::StatusCode::INVALID_ARGUMENT, "INVALID_FIELD", field);
  };
  v1::PrefillRequest bad = Prompt(10);
  bad.set_token_ids(7, 256);
  expect_invalid(For(bad), "token_ids[7]");
  bad = Prompt(10);
  bad.set_priority(101);
  expect_invalid(For(bad), "priority");
  expect_invalid({}, "token_ids");
  for (const uint32_t length : {2049u, 0xffffffffu})
    expect_invalid(ForLength(length), "num_tokens");
  v1::EstimateRequest late = For(Prompt(10));
  for (const int64_t seconds : {int64_t{0}, int64_t{-5}}) {
    late.mutable_deadline()->set_seconds(seconds);
    expect_invalid(late, "deadline");
  }
  bad = Prompt(10);
  bad.set_model("other");
  expect_refused(For(bad), grpc::StatusCode::NOT_FOUND, "UNKNOWN_MODEL", "");
  for (const v1::EstimateRequest& request : {For(Prompt(1500)), ForLength(1500)}) {
    expect_refused(request, grpc::StatusCode::FAILED_PRECONDITION, "PROMPT_EXCEEDS_POOL", "");
  }
}

TEST_F(EstimateTest, LooksAtIdsBeforeTheirNumber) {
  Start();
  EXPECT_TRUE(Run(Prompt(300)).status.ok());
  v1::EstimateRequest request = For(Prompt(300));
  request.set_num_tokens(5);
  EXPECT_EQ(Estimate(request).cached_tokens(), 256u);
}

TEST_F(EstimateTest, RequestIdIsNotLookedAt) {
  Start();
  Barrier barrier(backend_, "Attention", 0);
  v1::PrefillRequest prompt = Prompt(10);
  prompt.set_request_id("twice");
  const auto stub = NewStub();
  OpenCall running(stub.get(), prompt);
  barrier.WaitUntilReached();
  EXPECT_EQ(Estimate(For(prompt)).refusal(), v1::ERROR_REASON_UNSPECIFIED);
  barrier.Open();
  EXPECT_TRUE(running.Finish().status.ok());
}

// ---- GetLoads

TEST_F(EstimateTest, LoadsOfAnIdleServer) {
  Start();
  const v1::GetLoadsResponse loads = Loads();
  EXPECT_EQ(loads.model(), "tiny");
  EXPECT_TRUE(loads.accepting());
  EXPECT_EQ(loads.inflight_requests(), 0u);
  EXPECT_EQ(loads.max_requests(), 64u);
  EXPECT_EQ(loads.max_tokens(), uint64_t{1} << 20);
  EXPECT_EQ(loads.tokens_per_second(), 0);
  EXPECT_EQ(loads.kv_pool_tokens(), static_cast<uint64_t>(server_->Snapshot().pool_blocks) * 128u);
  EXPECT_EQ(loads.kv_pool_used_tokens(), 0u);
  EXPECT_EQ(loads.kv_pool_cached_tokens(), 0u);
  EXPECT_EQ(loads.host_kv_bytes(), static_cast<uint64_t>(server_->Snapshot().host_kv_bytes));
  EXPECT_EQ(loads.host_kv_used_bytes(), 0u);
  EXPECT_EQ(loads.leases(), 0u);
}

TEST_F(EstimateTest, LoadsWhileOneComputesAndOneWaits) {
  Start();
  Barrier barrier(backend_, "Attention", 0);
  const auto stub = NewStub();
  OpenCall running(stub.get(), First(300));
  barrier.WaitUntilReached();
  OpenCall queued(stub.get(), Prompt(20));
  WaitForQueued(1);
  const v1::GetLoadsResponse loads = Loads();
  EXPECT_EQ(loads.queued_requests(), 1u);
  EXPECT_EQ(loads.queued_tokens(), 20u);
  EXPECT_EQ(loads.inflight_requests(), 2u);
  EXPECT_EQ(loads.inflight_tokens(), 320u);
  EXPECT_EQ(loads.kv_pool_used_tokens(), 384u) << "three pages";
  EXPECT_GT(loads.host_kv_used_bytes(), 0u);
  EXPECT_FALSE(loads.has_predicted_drain()) << "nothing is known";
  barrier.Open();
  EXPECT_TRUE(running.Finish().status.ok());
  EXPECT_TRUE(queued.Finish().status.ok());
}

TEST_F(EstimateTest, LoadsPredictTheEndOnceTheyCan) {
  Start();
  LetItLearn();
  EXPECT_EQ(Nanoseconds(Loads().predicted_drain()), 0);
  EXPECT_GT(Loads().tokens_per_second(), 0);
  Barrier barrier(backend_, "Attention", 0);
  const auto stub = NewStub();
  OpenCall running(stub.get(), First(10));
  barrier.WaitUntilReached();
  OpenCall queued(stub.get(), Prompt(2000));
  WaitForQueued(1);
  EXPECT_GT(Nanoseconds(Loads().predicted_drain()), 0);
  barrier.Open();
  EXPECT_TRUE(running.Finish().status.ok());
  EXPECT_TRUE(queued.Finish().status.ok());
}

TEST_F(EstimateTest, LoadsOfLeasesAndOfTheCache) {
  Start();
  const CallResult computed = Run(DetachedPrompt(300));
  ASSERT_TRUE(computed.status.ok()) << computed.status.error_message();
  EXPECT_TRUE(ComesTrue([this] { return Loads().kv_pool_used_tokens() == 0; })) << "copied out";
  v1::GetLoadsResponse loads = Loads();
  EXPECT_EQ(loads.leases(), 1u);
  EXPECT_EQ(loads.inflight_requests(), 1u);
  EXPECT_EQ(loads.queued_requests(), 0u);
  EXPECT_GT(loads.host_kv_used_bytes(), 0u);
  EXPECT_EQ(loads.kv_pool_cached_tokens(), 256u);
  EXPECT_EQ(loads.prompt_tokens_total(), 300u);
  EXPECT_EQ(loads.cached_tokens_total(), 0u);

  grpc::ClientContext context;
  v1::ReleaseKvRequest release;
  release.set_fetch_id(computed.responses.front().accepted().fetch_id());
  v1::ReleaseKvResponse released;
  EXPECT_TRUE(NewStub()->ReleaseKv(&context, release, &released).ok());
  EXPECT_TRUE(Run(Prompt(300)).status.ok());
  EXPECT_TRUE(BecomesIdle(absl::Seconds(10))) << WhatIsLeft();
  loads = Loads();
  EXPECT_EQ(loads.leases(), 0u);
  EXPECT_EQ(loads.host_kv_used_bytes(), 0u);
  EXPECT_EQ(loads.prompt_tokens_total(), 600u);
  EXPECT_EQ(loads.cached_tokens_total(), 256u);
}

}  // namespace
}  // namespace headstart::testing
