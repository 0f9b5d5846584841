// `headstart request` and `headstart loads`, from the command line to the exit code, against a
// made-up server.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstddef>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "client/page_names.h"
#include "tests/client/commands_fixture.h"

namespace headstart {
namespace {

using ::testing::HasSubstr;
using testing::PrefillWriter;
using testing::RichStatus;

std::string ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

TEST_F(CommandsTest, RequestPrintsATable) {
  EXPECT_EQ(Run("request", {"--tokens-file", dir_ / "ids"}), 0) << stderr_;
  for (const char* part : {"prompt 21 tokens", "\n  attention              0.250 s     25.0 %",
                           "sparsity  0.250: 75.0 % of the causal blocks ran",
                           "layer   0  0.000  \n", "layer   1  0.500  ████████████████████\n",
                           "first token  42", "in 9 chunks on 1 connection at"}) {
    EXPECT_THAT(stdout_, HasSubstr(part));
  }
  EXPECT_THAT(stdout_, ::testing::Not(HasSubstr("\x1b")))
      << "a server must not write to the terminal";
  EXPECT_EQ(stderr_, "") << "no progress where there is no terminal";
}

TEST_F(CommandsTest, RequestPrintsJson) {
  EXPECT_EQ(Run("request", {"--tokens-file", dir_ / "ids", "--json"}), 0) << stderr_;
  const auto json = nlohmann::json::parse(stdout_);
  EXPECT_EQ(json["prompt_tokens"], 21);
  EXPECT_EQ(json["first_token"]["id"], 42);
  EXPECT_EQ(json["server"]["attention_seconds"], 0.25);
  EXPECT_EQ(json["attention"]["density"], 0.75);
  EXPECT_EQ(json["attention"]["layer_density"], nlohmann::json({1.0, 0.5, 1.0}));
  EXPECT_EQ(json["kv"]["bytes"], kv_.size());
  EXPECT_GT(json["ttft_seconds"], 0.0);
}

TEST_F(CommandsTest, RequestSendsItsFlags) {
  EXPECT_EQ(Run("request",
                {"--tokens-file", dir_ / "ids", "--preset", "fast", "--gamma", "0.5", "--stride",
                 "8", "--budget", "row", "--temperature", "0.7", "--top-k", "5", "--seed", "9"}),
            0)
      << stderr_;
  const v1::PrefillRequest request = server_->last_request();
  EXPECT_EQ(request.attention().preset(), v1::ATTENTION_PRESET_FAST);
  EXPECT_EQ(request.attention().budget(), v1::BUDGET_RULE_ROW);
  EXPECT_EQ(request.attention().gamma(), 0.5f);
  EXPECT_EQ(request.attention().stride(), 8);
  EXPECT_FALSE(request.attention().has_num_proxies());
  EXPECT_EQ(request.sampling().temperature(), 0.7f);
  EXPECT_EQ(request.sampling().top_k(), 5);
  EXPECT_EQ(request.sampling().seed(), 9);
}

TEST_F(CommandsTest, RequestLeavesAttentionToTheServer) {
  EXPECT_EQ(Run("request", {"--tokens-file", dir_ / "ids"}), 0);
  EXPECT_FALSE(server_->last_request().has_attention());
}

TEST_F(CommandsTest, RequestSavesManifestAndKv) {
  EXPECT_EQ(Run("request", {"--tokens-file", dir_ / "ids", "--save", dir_ / "out"}), 0) << stderr_;
  const std::string kv(reinterpret_cast<const char*>(kv_.data()), kv_.size());
  EXPECT_TRUE(ReadFile(dir_ / "out/kv.bin") == kv);
  const auto manifest = nlohmann::json::parse(ReadFile(dir_ / "out/manifest.json"));
  EXPECT_EQ(manifest["num_tokens"], 21);
  EXPECT_EQ(manifest["layout"]["num_layers"], 3);
  EXPECT_EQ(manifest["layer_density"].size(), 3);
}

TEST_F(CommandsTest, RequestAsksForAKvTypeAndSavesItAsItIsSent) {
  EXPECT_EQ(Run("request", {"--tokens-file", dir_ / "ids", "--save", dir_ / "out"}), 0) << stderr_;
  EXPECT_EQ(server_->last_request().kv_dtype(), v1::KV_DTYPE_UNSPECIFIED);
  EXPECT_FALSE(std::ifstream(dir_ / "out/scales.bin").good());
  const std::vector<std::string> as_fp8 = {"--tokens-file", dir_ / "ids", "--kv-dtype",
                                           "fp8_e4m3",      "--save",     dir_ / "fp8"};
  EXPECT_EQ(Run("request", as_fp8), 5) << "the server sends bf16";
  EXPECT_THAT(stderr_, HasSubstr("dtype=1, expected 4"));
  EXPECT_EQ(server_->last_request().kv_dtype(), v1::KV_DTYPE_FP8_E4M3);

  testing::KvStreamSpec spec;
  spec.dtype = v1::KV_DTYPE_FP8_E4M3;
  const std::vector<std::byte> kv = testing::MakeKv(spec);
  stream_ = testing::MakeStream(spec, kv);
  EXPECT_EQ(Run("request", as_fp8), 0) << stderr_;
  const std::string numbers(reinterpret_cast<const char*>(kv.data()), kv.size());
  EXPECT_TRUE(ReadFile(dir_ / "fp8/kv.bin") == numbers);
  std::string scales;
  for (int64_t i = 0; i < 3 * 6 * 2 * 2; ++i) {  // layers, pages, K and V, heads
    const float scale = ScaleOf(spec, i / 24, i / 4 % 6, i / 2 % 2, i % 2);
    scales.append(reinterpret_cast<const char*>(&scale), sizeof(scale));
  }
  EXPECT_TRUE(ReadFile(dir_ / "fp8/scales.bin") == scales);

  EXPECT_EQ(Run("request", {"--tokens-file", dir_ / "ids", "--kv-dtype", "fp4"}), 2);
  EXPECT_THAT(stderr_, HasSubstr("--kv-dtype"));
}

TEST_F(CommandsTest, RequestTellsWhatWasPredictedAndCached) {
  const auto edit = [](v1::KvManifest& manifest) { manifest.mutable_cache_root(); };
  edit(*stream_[1].mutable_manifest());
  const auto ids = RequestFor(spec_).token_ids();
  const std::string names = PageNames(stream_[1].manifest(), {ids.data(), 21});
  testing::EditCompleted(&stream_.back(), [&](v1::Completed& completed) {
    edit(*completed.mutable_manifest());
    completed.mutable_manifest()->set_cached_tokens(8);
    completed.mutable_manifest()->set_cached_algorithm(v1::AttentionProvenance::ALGORITHM_DENSE);
    completed.mutable_manifest()->set_page_hashes(names);
    completed.mutable_statistics()->mutable_gave_way()->set_nanos(500'000'000);
  });
  EXPECT_EQ(Run("request", {"--tokens-file", dir_ / "ids"}), 0) << stderr_;
  EXPECT_THAT(stdout_, HasSubstr("prefix  8 of 21 tokens cached (dense), KV of 0 not sent\n"));
  EXPECT_THAT(stdout_, HasSubstr("gave_way               0.500 s     50.0 %"));
  EXPECT_THAT(stdout_, ::testing::Not(HasSubstr("predicted"))) << "nothing was said";

  stream_[0].mutable_accepted()->mutable_predicted_ttft()->set_nanos(750'000'000);
  EXPECT_EQ(Run("request", {"--tokens-file", dir_ / "ids"}), 0) << stderr_;
  EXPECT_THAT(stdout_, HasSubstr("\n  predicted              0.750 s  (when it was accepted)"));
  EXPECT_EQ(Run("request", {"--tokens-file", dir_ / "ids", "--json"}), 0) << stderr_;
  const auto json = nlohmann::json::parse(stdout_);
  EXPECT_EQ(json["predicted_ttft_seconds"], 0.75);
  EXPECT_EQ(json["prefix"]["cached_tokens"], 8);
  EXPECT_EQ(json["prefix"]["cached_algorithm"], "dense");
  EXPECT_EQ(json["prefix"]["page_names"][4],
            absl::BytesToHexString(names.substr(4 * kPageNameBytes)));
  EXPECT_EQ(json["server"]["gave_way_seconds"], 0.5);

  EXPECT_EQ(Run("request", {"--tokens-file", dir_ / "ids", "--save", dir_ / "out"}), 0) << stderr_;
  EXPECT_EQ(ReadFile(dir_ / "out/pages.bin"), names);
  EXPECT_EQ(Run("request", {"--tokens-file", dir_ / "ids", "--held-pages", dir_ / "out/pages.bin"}),
            0)
      << stderr_;
  EXPECT_EQ(server_->last_request().held_pages(), names);
}

TEST_F(CommandsTest, RequestSendsPriorityAndWhatItWantsOfTheCache) {
  EXPECT_EQ(Run("request", {"--tokens-file", dir_ / "ids", "--priority", "-7", "--cache-salt",
                            "tenant", "--prefix-reuse", "none"}),
            0)
      << stderr_;
  EXPECT_EQ(server_->last_request().priority(), -7);
  EXPECT_EQ(server_->last_request().cache_salt(), "tenant");
  EXPECT_EQ(server_->last_request().prefix_reuse(), v1::PREFIX_REUSE_NONE);
  EXPECT_EQ(Run("request", {"--tokens-file", dir_ / "ids", "--prefix-reuse", "dense"}), 0);
  EXPECT_EQ(server_->last_request().prefix_reuse(), v1::PREFIX_REUSE_DENSE);
  EXPECT_EQ(Run("request", {"--tokens-file", dir_ / "ids"}), 0);
  EXPECT_EQ(server_->last_request().prefix_reuse(), v1::PREFIX_REUSE_SAME_ATTENTION);
}

TEST_F(CommandsTest, RequestRefusesValuesThatNoServerCanMean) {
  std::ofstream(dir_ / "short") << "fifteen bytes..";
  const std::vector<std::vector<std::string>> wrong = {{"--priority", "101"},
                                                       {"--priority", "-101"},
                                                       {"--prefix-reuse", "sparse"},
                                                       {"--held-pages", dir_ / "none"},
                                                       {"--held-pages", dir_ / "short"},
                                                       {"--estimate", "--save", dir_ / "out"}};
  for (std::vector<std::string> arguments : wrong) {
    arguments.insert(arguments.end(), {"--tokens-file", dir_ / "ids"});
    EXPECT_EQ(Run("request", arguments), 2) << arguments.front();
  }
  EXPECT_EQ(server_->num_calls(), 0);
}

TEST_F(CommandsTest, RequestPrintsAnEstimateInsteadOfRunning) {
  EXPECT_EQ(Run("request", {"--tokens-file", dir_ / "ids", "--estimate", "--timeout", "9s"}), 0)
      << stderr_;
  EXPECT_EQ(stdout_,
            "would be accepted\ntime to first token  not known before prompts have run\n"
            "ahead  0 requests, 0 tokens\nprefix  0 tokens cached\n");
  EXPECT_EQ(server_->last_estimate().request().token_ids_size(), 21);
  EXPECT_EQ(server_->last_estimate().deadline().seconds(), 9);

  v1::EstimateResponse estimate;
  estimate.mutable_predicted_ttft()->set_nanos(750'000'000);
  estimate.mutable_predicted_queue()->set_nanos(250'000'000);
  estimate.mutable_predicted_compute()->set_nanos(500'000'000);
  estimate.set_cached_tokens(16);
  estimate.set_queue_requests(3);
  estimate.set_queue_tokens(99);
  estimate.set_refusal(v1::ERROR_REASON_DEADLINE_UNREACHABLE);
  estimate.mutable_retry_after()->set_seconds(2);
  server_->Answer(estimate);
  EXPECT_EQ(Run("request", {"--tokens-file", dir_ / "ids", "--estimate"}), 0) << stderr_;
  EXPECT_EQ(stdout_,
            "would be refused: DEADLINE_UNREACHABLE, try again in 2.000 s\n"
            "time to first token      0.750 s: queue 0.250 s, compute 0.500 s\n"
            "ahead  3 requests, 99 tokens\nprefix  16 tokens cached\n");
  EXPECT_EQ(Run("request", {"--tokens-file", dir_ / "ids", "--estimate", "--json"}), 0);
  EXPECT_EQ(nlohmann::json::parse(stdout_),
            nlohmann::json::parse(R"({"accepted": false, "refusal": "DEADLINE_UNREACHABLE",
              "retry_after_seconds": 2.0, "predicted_ttft_seconds": 0.75,
              "predicted_queue_seconds": 0.25, "predicted_compute_seconds": 0.5,
              "cached_tokens": 16, "queue_requests": 3, "queue_tokens": 99})"));
  EXPECT_EQ(server_->num_calls(), 0);
}

TEST_F(CommandsTest, LoadsPrintsATable) {
  v1::GetLoadsResponse loads;
  loads.set_model("tiny");
  loads.set_accepting(true);
  loads.set_queued_requests(2);
  loads.set_queued_tokens(300);
  loads.set_inflight_requests(3);
  loads.set_inflight_tokens(400);
  loads.set_max_requests(64);
  loads.set_max_tokens(5000);
  loads.set_tokens_per_second(1000);
  loads.set_kv_pool_tokens(1024);
  loads.set_kv_pool_used_tokens(512);
  loads.set_kv_pool_cached_tokens(256);
  loads.set_host_kv_bytes(2'000'000);
  loads.set_host_kv_used_bytes(500'000);
  loads.set_leases(1);
  loads.set_prompt_tokens_total(800);
  loads.set_cached_tokens_total(200);
  server_->Answer(loads);
  EXPECT_EQ(Run("loads", {}), 0) << stderr_;
  EXPECT_EQ(stdout_,
            "model tiny  accepting\n"
            "queued            2 requests           300 tokens\n"
            "in flight         3 requests           400 tokens\n"
            "limit            64 requests          5000 tokens\n"
            "speed          1000 tokens/s  all computed at a time not known yet\n"
            "KV pool        1024 tokens   50.0 % in use, 25.0 % cached\n"
            "host KV         2.0 MB   25.0 % in use, 1 leases\n"
            "prefix         25.0 % of 800 prompt tokens came from the cache\n");
  loads.mutable_predicted_drain()->set_seconds(4);
  loads.set_accepting(false);
  server_->Answer(loads);
  EXPECT_EQ(Run("loads", {}), 0);
  EXPECT_THAT(stdout_, HasSubstr("model tiny  not accepting\n"));
  EXPECT_THAT(stdout_, HasSubstr("all computed in 4.000 s\n"));
}

TEST_F(CommandsTest, LoadsPrintsJson) {
  v1::GetLoadsResponse loads;
  loads.set_queued_tokens(300);
  loads.set_kv_pool_cached_tokens(uint64_t{1} << 40);
  server_->Answer(loads);
  EXPECT_EQ(Run("loads", {"--json"}), 0) << stderr_;
  auto json = nlohmann::json::parse(stdout_);
  EXPECT_EQ(json["accepting"], false);
  EXPECT_EQ(json["queued_tokens"], 300);
  EXPECT_EQ(json["kv_pool_cached_tokens"], uint64_t{1} << 40);
  EXPECT_TRUE(json["predicted_drain_seconds"].is_null());
  EXPECT_EQ(json.size(), v1::GetLoadsResponse::descriptor()->field_count());
}

TEST_F(CommandsTest, RequestDrawsRandomIdsFromTheVocabulary) {
  Run("request",
      {"--random", "500:3"});  // the stream is of another prompt, but the request was sent
  const auto ids = server_->last_request().token_ids();
  ASSERT_EQ(ids.size(), 500);
  EXPECT_THAT(ids, ::testing::Each(::testing::Lt(1000)));
  EXPECT_THAT(stderr_, HasSubstr("DATA_LOSS"));
}

TEST_F(CommandsTest, ExitCodesSayWhatToDo) {
  const std::pair<grpc::StatusCode, int> codes[] = {{grpc::StatusCode::INVALID_ARGUMENT, 2},
                                                    {grpc::StatusCode::NOT_FOUND, 2},
                                                    {grpc::StatusCode::RESOURCE_EXHAUSTED, 75},
                                                    {grpc::StatusCode::UNAVAILABLE, 75},
                                                    {grpc::StatusCode::INTERNAL, 5}};
  for (const auto& [code, exit_code] : codes) {
    const grpc::Status status = RichStatus(code, "SOME_REASON");
    Serve([&](int, grpc::ServerContext&, PrefillWriter&) { return status; });
    EXPECT_EQ(Run("request", {"--tokens-file", dir_ / "ids"}), exit_code);
    EXPECT_THAT(stderr_, HasSubstr("headstart request: "));
    EXPECT_THAT(stderr_, HasSubstr("(SOME_REASON): server says no"));
  }
}

TEST_F(CommandsTest, RequestWantsExactlyOnePrompt) {
  EXPECT_EQ(Run("request", {}), 2);
  EXPECT_EQ(Run("request", {"--random", "5", "--tokens-file", dir_ / "ids"}), 2);
  EXPECT_EQ(server_->num_calls(), 0);
}

TEST_F(CommandsTest, TimesHaveUnitsOrAreSeconds) {
  for (const char* time : {"5s", "1m", "7", "1500ms"}) {
    EXPECT_EQ(Run("request", {"--tokens-file", dir_ / "ids", "--timeout", time}), 0) << time;
  }
  for (const char* time : {"0", "-1s", "25h", "soon", "inf"}) {
    EXPECT_EQ(Run("request", {"--tokens-file", dir_ / "ids", "--timeout", time}), 2) << time;
  }
}

}  // namespace
}  // namespace headstart
