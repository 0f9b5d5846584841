// What a server answers to good and bad requests.
#include <gtest/gtest.h>

#include <limits>
#include <string>

#include "tests/server/raw_call.h"
#include "tests/server/server_fixture.h"
#include "tests/testing/status_matchers.h"

namespace headstart::testing {
namespace {

using ::testing::HasSubstr;

class RequestTest : public ServerTest {
 protected:
  RequestTest() {
    options_.connections.max_message_bytes = 64 << 10;
    options_.kv_pool_tokens = 1024;  // less than the model's context
  }
  void SetUp() override { Start(); }

  // The request is refused with this code, reason and (for wrong fields) field; the server goes on.
  void ExpectRefused(const v1::PrefillRequest& request, grpc::StatusCode code,
                     const std::string& reason, const std::string& field = "") {
    const CallResult result = Run(request);
    EXPECT_EQ(result.status.error_code(), code) << result.status.error_message();
    EXPECT_EQ(result.reason(), reason);
    EXPECT_EQ(result.field(), field) << result.status.error_message();
    EXPECT_TRUE(result.responses.empty());
    EXPECT_TRUE(Run(Prompt(3)).status.ok());
  }
  void ExpectInvalid(const v1::PrefillRequest& request, const std::string& field) {
    ExpectRefused(request, grpc::StatusCode::INVALID_ARGUMENT, "INVALID_FIELD", field);
  }
};

TEST_F(RequestTest, AnswersInTheOrderOfTheWireFormat) {
  v1::PrefillRequest request = Prompt(300);
  request.set_request_id("request-1");
  request.set_transfer_params("opaque");
  const CallResult result = Run(request);
  ASSERT_TRUE(result.status.ok()) << result.status.error_message();
  EXPECT_EQ(result.request_id, "request-1");

  ASSERT_GE(result.responses.size(), 4u);
  const v1::Accepted& accepted = result.responses.front().accepted();
  EXPECT_EQ(accepted.request_id(), "request-1");
  EXPECT_EQ(accepted.transfer_params(), "opaque");
  EXPECT_EQ(accepted.queue_requests(), 0u);
  const v1::KvManifest& manifest = result.responses[1].manifest();
  EXPECT_EQ(manifest.model(), "tiny");
  EXPECT_EQ(manifest.num_tokens(), 300u);
  EXPECT_EQ(manifest.model_hash().size(), 64u);
  EXPECT_EQ(manifest.token_hash().size(), 32u);
  EXPECT_EQ(manifest.layer_density_size(), 0);
  const v1::Completed completed = CompletedOf(result.responses.back());
  uint64_t bytes = 0;
  for (size_t i = 2; i + 1 < result.responses.size(); ++i) {
    ASSERT_TRUE(result.responses[i].has_chunk());
    EXPECT_EQ(result.responses[i].chunk().index(), i - 2);
    bytes += result.responses[i].chunk().data().size();
  }
  EXPECT_EQ(completed.num_chunks(), result.responses.size() - 3);
  EXPECT_EQ(completed.kv_bytes(), bytes);
  EXPECT_EQ(bytes, 300u * 1024u);
  EXPECT_EQ(completed.manifest().layer_density_size(), model_.num_layers);
}

TEST_F(RequestTest, PartsOfTheTimeAddUpToTheTotal) {
  const CallResult result = Run(Prompt(700));
  ASSERT_TRUE(result.status.ok());
  const v1::PrefillStatistics s = CompletedOf(result.responses.back()).statistics();
  const auto nanoseconds = [](const google::protobuf::Duration& d) {
    return d.seconds() * 1000000000 + d.nanos();
  };
  const int64_t sum = nanoseconds(s.queue()) + nanoseconds(s.selection()) +
                      nanoseconds(s.attention()) + nanoseconds(s.other_compute()) +
                      nanoseconds(s.exposed_transfer()) + nanoseconds(s.gave_way());
  EXPECT_NEAR(sum, nanoseconds(s.total()), 1000);
  EXPECT_GT(nanoseconds(s.attention()), 0);
  EXPECT_GT(nanoseconds(s.other_compute()), 0);
}

TEST_F(RequestTest, RefusesAnEmptyPrompt) { ExpectInvalid(Prompt(0), "token_ids"); }

TEST_F(RequestTest, RefusesAPromptLongerThanTheContext) {
  ExpectInvalid(Prompt(model_.max_positions + 1), "token_ids");
}

TEST_F(RequestTest, RefusesAPromptLongerThanTheKvPool) {
  ExpectRefused(Prompt(options_.kv_pool_tokens + 1), grpc::StatusCode::FAILED_PRECONDITION,
                "PROMPT_EXCEEDS_POOL");
}

TEST_F(RequestTest, RefusesTokenIdsOutOfRange) {
  for (const uint32_t id : {256u, 0x7fffffffu, 0x80000000u, 0xffffffffu}) {
    v1::PrefillRequest request = Prompt(10);
    request.set_token_ids(7, id);
    ExpectInvalid(request, "token_ids[7]");
    EXPECT_THAT(Run(request).status.error_message(), HasSubstr(std::to_string(id)));
  }
}

TEST_F(RequestTest, RefusesAnUnknownModel) {
  v1::PrefillRequest request = Prompt(3);
  request.set_model("other\nmodel");
  ExpectRefused(request, grpc::StatusCode::NOT_FOUND, "UNKNOWN_MODEL");
  EXPECT_EQ(Run(request).status.error_message().find('\n'), std::string::npos);
  request.set_model("tiny");
  EXPECT_TRUE(Run(request).status.ok());
}

TEST_F(RequestTest, RefusesAnotherKvDtype) {
  v1::PrefillRequest request = Prompt(3);
  request.set_kv_dtype(v1::KV_DTYPE_F16);
  ExpectRefused(request, grpc::StatusCode::FAILED_PRECONDITION, "KV_DTYPE_UNAVAILABLE");
  request.set_kv_dtype(static_cast<v1::KvDtype>(77));
  ExpectInvalid(request, "kv_dtype");
  request.set_kv_dtype(v1::KV_DTYPE_F32);
  EXPECT_TRUE(Run(request).status.ok());
}

TEST_F(RequestTest, ShipsFp8ToWhoAsksForIt) {
  v1::GetServerInfoResponse info;
  grpc::ClientContext context;
  ASSERT_TRUE(NewStub()->GetServerInfo(&context, v1::GetServerInfoRequest(), &info).ok());
  ASSERT_EQ(info.kv_dtypes_size(), 2);
  EXPECT_EQ(info.kv_dtypes(0), v1::KV_DTYPE_F32);
  EXPECT_EQ(info.kv_dtypes(1), v1::KV_DTYPE_FP8_E4M3);

  v1::PrefillRequest request = Prompt(300);
  request.set_kv_dtype(v1::KV_DTYPE_FP8_E4M3);
  const CallResult result = Run(request);
  ASSERT_TRUE(result.status.ok()) << result.status.error_message();
  EXPECT_EQ(result.responses[1].manifest().layout().dtype(), v1::KV_DTYPE_FP8_E4M3);
  uint64_t bytes = 0;
  for (const v1::PrefillResponse& response : result.responses) {
    bytes += response.chunk().data().size();
  }
  const uint64_t scales = uint64_t{3} * model_.num_layers * 2 * model_.num_kv_heads * 4;  // 3 pages
  EXPECT_EQ(bytes, 300u * 1024u / 4 + scales);
  EXPECT_EQ(CompletedOf(result.responses.back()).kv_bytes(), bytes);
}

TEST_F(RequestTest, RefusesBadRequestIds) {
  v1::PrefillRequest request = Prompt(3);
  for (const std::string& id : {std::string("a b"), std::string("a\nb"), std::string("\x01"),
                                std::string("ä"), std::string(129, 'a'), std::string("a{b}")}) {
    request.set_request_id(id);
    ExpectInvalid(request, "request_id");
  }
  request.set_request_id(std::string(128, 'a'));
  EXPECT_TRUE(Run(request).status.ok());
}

TEST_F(RequestTest, ChoosesARequestId) {
  const CallResult result = Run(Prompt(3));
  EXPECT_EQ(result.request_id.size(), 16u);
  EXPECT_EQ(result.responses.front().accepted().request_id(), result.request_id);
  EXPECT_NE(Run(Prompt(3)).request_id, result.request_id);
}

TEST_F(RequestTest, TakesTheRequestIdOfTheMetadata) {
  const auto with_id = [](const char* id) {
    return [id](grpc::ClientContext& context) { context.AddMetadata("x-request-id", id); };
  };
  EXPECT_EQ(Run(Prompt(3), with_id("from-metadata")).request_id, "from-metadata");
  v1::PrefillRequest named = Prompt(3);
  named.set_request_id("from-message");
  EXPECT_EQ(Run(named, with_id("from-metadata")).request_id, "from-message");
  EXPECT_EQ(Run(Prompt(3), with_id("not good")).field(), "request_id");
}

TEST_F(RequestTest, EchoesTheIdOfARefusedRequest) {
  v1::PrefillRequest request = Prompt(0);
  request.set_request_id("refused");
  EXPECT_EQ(Run(request).request_id, "refused");
}

TEST_F(RequestTest, TakesATraceparent) {
  EXPECT_TRUE(Run(Prompt(3), [](grpc::ClientContext& context) {
                context.AddMetadata("traceparent",
                                    "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01");
              }).status.ok());
}

TEST_F(RequestTest, RefusesBadAttention) {
  const auto expect_invalid = [this](auto set, const std::string& field) {
    v1::PrefillRequest request = Prompt(3);
    set(request.mutable_attention());
    ExpectInvalid(request, field);
  };
  expect_invalid([](auto* a) { a->set_num_proxies(3); }, "attention.num_proxies");
  expect_invalid([](auto* a) { a->set_num_proxies(0xffffffffu); }, "attention.num_proxies");
  expect_invalid([](auto* a) { a->set_stride(5); }, "attention.stride");
  expect_invalid([](auto* a) { a->set_gamma(0); }, "attention.gamma");
  expect_invalid([](auto* a) { a->set_gamma(std::numeric_limits<float>::quiet_NaN()); },
                 "attention.gamma");
  expect_invalid([](auto* a) { a->set_sink_blocks(2); }, "attention.sink_blocks");
  expect_invalid([](auto* a) { a->set_preset(static_cast<v1::AttentionPreset>(9)); },
                 "attention.preset");
  expect_invalid([](auto* a) { a->set_budget(static_cast<v1::BudgetRule>(9)); },
                 "attention.budget");
  expect_invalid(
      [](auto* a) {
        a->set_preset(v1::ATTENTION_PRESET_EXACT);
        a->set_gamma(0.5f);
      },
      "attention");
}

TEST_F(RequestTest, ReportsTheAttentionThatRan) {
  v1::PrefillRequest request = Prompt(600);
  request.mutable_attention()->set_preset(v1::ATTENTION_PRESET_FAST);
  request.mutable_attention()->set_dense_below_tokens(100);
  request.mutable_attention()->set_floor_tokens(0);
  const CallResult sparse = Run(request);
  ASSERT_TRUE(sparse.status.ok()) << sparse.status.error_message();
  const v1::AttentionProvenance& ran = sparse.responses[1].manifest().attention();
  EXPECT_EQ(ran.algorithm(), v1::AttentionProvenance::ALGORITHM_PROXY_ATTN);
  EXPECT_EQ(ran.options().preset(), v1::ATTENTION_PRESET_FAST);
  EXPECT_EQ(ran.options().dense_below_tokens(), 100u);
  EXPECT_EQ(ran.options().stride(), 16u);
  EXPECT_EQ(ran.dense_reason(), v1::AttentionProvenance::DENSE_REASON_UNSPECIFIED);

  request.mutable_attention()->set_dense_below_tokens(600);
  const CallResult dense = Run(request);
  const v1::AttentionProvenance& fell_back = dense.responses[1].manifest().attention();
  EXPECT_EQ(fell_back.algorithm(), v1::AttentionProvenance::ALGORITHM_DENSE);
  EXPECT_EQ(fell_back.dense_reason(), v1::AttentionProvenance::DENSE_REASON_BELOW_DENSE_LIMIT);
}

TEST_F(RequestTest, RefusesBadSampling) {
  v1::PrefillRequest request = Prompt(3);
  request.mutable_sampling()->set_temperature(-1);
  ExpectInvalid(request, "sampling.temperature");
  request.mutable_sampling()->set_temperature(1);
  request.mutable_sampling()->set_top_k(0xffffffffu);
  ExpectInvalid(request, "sampling.top_k");
}

TEST_F(RequestTest, RefusesBytesBeyondTheirLimits) {
  v1::PrefillRequest request = Prompt(3);
  request.set_transfer_params(std::string(4097, 'x'));
  ExpectInvalid(request, "transfer_params");
  request.clear_transfer_params();
  request.set_attempt_key(std::string(65, 'x'));
  ExpectInvalid(request, "attempt_key");
}

TEST_F(RequestTest, RefusesBadPriorities) {
  v1::PrefillRequest request = Prompt(3);
  for (const int32_t priority :
       {101, -101, std::numeric_limits<int32_t>::max(), std::numeric_limits<int32_t>::min()}) {
    request.set_priority(priority);
    ExpectInvalid(request, "priority");
    EXPECT_THAT(Run(request).status.error_message(),
                HasSubstr("priority=" + std::to_string(priority) + " is not in [-100, 100]"));
  }
  for (const int32_t priority : {100, -100}) {
    request.set_priority(priority);
    EXPECT_TRUE(Run(request).status.ok());
  }
}

TEST_F(RequestTest, RefusesLongSalts) {
  v1::PrefillRequest request = Prompt(3);
  request.set_cache_salt(std::string(65, '\xff'));
  ExpectInvalid(request, "cache_salt");
  EXPECT_EQ(Run(request).status.error_message(), "cache_salt has 65 bytes, limit 64");
  request.set_cache_salt(std::string(64, '\xff'));
  EXPECT_TRUE(Run(request).status.ok());
}

TEST_F(RequestTest, RefusesAnUnknownPrefixReuse) {
  v1::PrefillRequest request = Prompt(3);
  request.set_prefix_reuse(static_cast<v1::PrefixReuse>(7));
  ExpectInvalid(request, "prefix_reuse");
  EXPECT_EQ(Run(request).status.error_message(), "prefix_reuse=7 is not a way to reuse prefixes");
}

TEST_F(RequestTest, RefusesHeldPagesThatAreNoNames) {
  v1::PrefillRequest request = Prompt(3);
  request.set_held_pages(std::string(33, 'x'));
  ExpectInvalid(request, "held_pages");
  EXPECT_EQ(Run(request).status.error_message(), "held_pages has 33 bytes, not a multiple of 16");
  request.set_prefix_reuse(v1::PREFIX_REUSE_NONE);
  ExpectInvalid(request, "held_pages");
}

TEST_F(RequestTest, RefusesHeldPagesBehindADenseStart) {
  v1::PrefillRequest request = Prompt(600);
  request.mutable_attention()->set_preset(v1::ATTENTION_PRESET_FAST);
  request.mutable_attention()->set_dense_below_tokens(100);
  request.set_held_pages(std::string(16, 'x'));
  request.set_prefix_reuse(v1::PREFIX_REUSE_DENSE);
  ExpectInvalid(request, "held_pages");
  EXPECT_EQ(Run(request).status.error_message(),
            "held_pages: behind dense pages sparse ones have no names to be held by");
  request.mutable_attention()->set_dense_below_tokens(600);
  EXPECT_TRUE(Run(request).status.ok()) << "all of it is dense";
}

// ---- below the message

TEST_F(RequestTest, MalformedProtobufIsAnInvalidArgumentAndTheConnectionSurvives) {
  const auto channel = NewChannel();
  for (const char* method : {"Prefill", "FetchKv", "RenewLease", "ReleaseKv", "GetModelInfo",
                             "GetServerInfo", "Estimate", "GetLoads"}) {
    for (const std::string& bytes :
         {std::string("\x1a\x05\x01"), std::string("\xff\xff\xff\xff"),
          std::string("\x0a\x02\xff\xfe")}) {  // truncated; no tag; bad UTF-8 in a string
      const bool has_string = std::string(method) == "Prefill" ||
                              std::string(method) == "GetModelInfo" ||
                              std::string(method) == "Estimate";
      if (!has_string && bytes[0] == '\x0a') continue;
      const CallResult result = RawCall(channel, method, {bytes});
      EXPECT_EQ(result.status.error_code(), grpc::StatusCode::INVALID_ARGUMENT) << method;
      EXPECT_EQ(result.reason(), "MALFORMED_REQUEST");
    }
  }
  grpc::ClientContext context;
  v1::GetServerInfoResponse info;
  EXPECT_TRUE(v1::PrefillService::NewStub(channel)->GetServerInfo(&context, {}, &info).ok());
}

TEST_F(RequestTest, CallWithoutAMessageIsAnInvalidArgument) {
  const CallResult result = RawCall(NewChannel(), "Prefill", {});
  EXPECT_EQ(result.status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_EQ(result.reason(), "MALFORMED_REQUEST");
}

TEST_F(RequestTest, SecondMessageOfACallIsAnInvalidArgument) {
  const std::string request = Prompt(3).SerializeAsString();
  Barrier barrier(backend_, "Attention", 0);  // else the call may be over before it comes
  const CallResult result = RawCall(NewChannel(), "Prefill", {request, request});
  EXPECT_EQ(result.status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_EQ(result.reason(), "MALFORMED_REQUEST");
  barrier.Open();
  EXPECT_TRUE(BecomesIdle(absl::Seconds(10))) << WhatIsLeft();
}

TEST_F(RequestTest, UnknownMethodIsUnimplemented) {
  EXPECT_EQ(RawCall(NewChannel(), "NoSuchMethod", {"x"}).status.error_code(),
            grpc::StatusCode::UNIMPLEMENTED);
}

TEST_F(RequestTest, TooLargeAMessageIsResourceExhausted) {
  const std::string large(options_.connections.max_message_bytes + 1, 'x');
  for (const char* method : {"Prefill", "GetModelInfo"}) {
    EXPECT_EQ(RawCall(NewChannel(), method, {large}).status.error_code(),
              grpc::StatusCode::RESOURCE_EXHAUSTED)
        << method;
  }
  EXPECT_TRUE(Run(Prompt(3)).status.ok());
}

TEST_F(RequestTest, CompressedRequestsAreUnimplemented) {
  for (const auto algorithm : {GRPC_COMPRESS_GZIP, GRPC_COMPRESS_DEFLATE}) {
    const CallResult result = Run(Prompt(1000), [algorithm](grpc::ClientContext& context) {
      context.set_compression_algorithm(algorithm);
    });
    EXPECT_EQ(result.status.error_code(), grpc::StatusCode::UNIMPLEMENTED);
  }
}

TEST_F(RequestTest, TooLargeMetadataIsResourceExhausted) {
  const CallResult result = Run(Prompt(3), [](grpc::ClientContext& context) {
    context.AddMetadata("x-padding", std::string(16 << 10, 'x'));
  });
  EXPECT_EQ(result.status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_TRUE(Run(Prompt(3)).status.ok());
}

// ---- infos

TEST_F(RequestTest, DescribesTheModel) {
  grpc::ClientContext context;
  v1::GetModelInfoResponse info;
  ASSERT_TRUE(NewStub()->GetModelInfo(&context, {}, &info).ok());
  EXPECT_EQ(info.model(), "tiny");
  EXPECT_EQ(info.architecture(), "llama");
  EXPECT_EQ(info.vocab_size(), 256u);
  EXPECT_EQ(info.max_prompt_tokens(), 1024u);
  EXPECT_EQ(info.num_heads(), 4u);
  EXPECT_EQ(info.kv_layout().num_layers(), 2u);
  EXPECT_EQ(info.kv_layout().num_kv_heads(), 2u);
  EXPECT_EQ(info.kv_layout().head_dim(), 32u);
  EXPECT_EQ(info.kv_layout().dtype(), v1::KV_DTYPE_F32);
  EXPECT_EQ(info.kv_layout().block_tokens(), 128u);
  EXPECT_EQ(info.kv_layout().rope().type(), "default");
  EXPECT_EQ(info.kv_bytes_per_token(), 1024u);
}

TEST_F(RequestTest, ModelInfoOfAnotherModelIsNotFound) {
  grpc::ClientContext context;
  v1::GetModelInfoRequest request;
  request.set_model("other");
  v1::GetModelInfoResponse info;
  EXPECT_EQ(NewStub()->GetModelInfo(&context, request, &info).error_code(),
            grpc::StatusCode::NOT_FOUND);
}

TEST_F(RequestTest, DescribesTheServer) {
  grpc::ClientContext context;
  v1::GetServerInfoResponse info;
  ASSERT_TRUE(NewStub()->GetServerInfo(&context, {}, &info).ok());
  EXPECT_EQ(info.backend(), "cpu");
  EXPECT_FALSE(info.version().empty());
  EXPECT_FALSE(info.device().empty());
  EXPECT_EQ(info.default_attention().preset(), v1::ATTENTION_PRESET_BALANCED);
  EXPECT_EQ(info.max_queue_requests(), 64u);
  EXPECT_EQ(info.kv_pool_tokens(), 1024u);
  EXPECT_EQ(info.default_deadline().seconds(), 120);
  EXPECT_EQ(info.piece_tokens(), 8192u);
  EXPECT_EQ(info.batch_tokens(), 2048u);
  EXPECT_TRUE(info.prefix_cache());
  EXPECT_GT(info.host_kv_bytes(), 0u);
  EXPECT_EQ(info.default_lease().seconds(), 60);
  EXPECT_EQ(info.max_lease().seconds(), 600);
  EXPECT_FALSE(info.draining());
}

TEST_F(RequestTest, HealthKnowsTheServiceByName) {
  EXPECT_EQ(Health(), "SERVING");
  EXPECT_EQ(Health("headstart.v1.PrefillService"), "SERVING");
  EXPECT_EQ(Health("other"), "error 5");
}

TEST_F(RequestTest, ReflectionListsTheServiceOnLoopback) {
  // ServerReflectionRequest{list_services = 7: ""}
  const CallResult result =
      RawCallOf(NewChannel(), "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
                {std::string("\x3a\x00", 2)});
  EXPECT_TRUE(result.status.ok()) << result.status.error_message();
}

class NoReflectionTest : public ServerTest {};

TEST_F(NoReflectionTest, ReflectionCanBeSwitchedOff) {
  options_.reflection = Reflection::kOff;
  Start();
  const CallResult result =
      RawCallOf(NewChannel(), "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
                {std::string("\x3a\x00", 2)});
  EXPECT_EQ(result.status.error_code(), grpc::StatusCode::UNIMPLEMENTED);
}

}  // namespace
}  // namespace headstart::testing
