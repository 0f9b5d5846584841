// `headstart bench`, from the command line to the exit code, against a made-up server.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <fstream>
#include <iterator>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_split.h"
#include "absl/types/span.h"
#include "client/checksum.h"
#include "kernels/base/instant.h"
#include "proto/grpc_time.h"
#include "tests/client/commands_fixture.h"

namespace headstart {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Key;
using testing::PrefillWriter;
using testing::RichStatus;
using testing::WriteStream;

// The right answer to any prompt.
testing::KvStream StreamFor(const v1::PrefillRequest& request) {
  testing::KvStreamSpec spec;
  spec.num_tokens = request.token_ids_size();
  spec.skip_tokens = request.skip_tokens();
  testing::KvStream stream = MakeStream(spec, MakeKv(spec));
  const auto& ids = request.token_ids();
  const std::string hash = TokenHash(absl::MakeConstSpan(ids.data(), ids.size()));
  stream[0].mutable_accepted()->mutable_predicted_ttft()->set_seconds(1000);
  stream[1].mutable_manifest()->set_token_hash(hash);
  stream[1].mutable_manifest()->mutable_cache_root();  // dense
  testing::EditCompleted(&stream.back(), [&](v1::Completed& completed) {
    v1::KvManifest& manifest = *completed.mutable_manifest();
    manifest.set_token_hash(hash);
    manifest.mutable_cache_root();
    manifest.set_cached_tokens(request.token_ids_size() / 2);
    manifest.set_cached_algorithm(v1::AttentionProvenance::ALGORITHM_DENSE);
  });
  return stream;
}

class BenchCommandTest : public CommandsTest {
 protected:
  void ServeAnyPrompt() {
    Serve([this](int call, grpc::ServerContext&, PrefillWriter& writer) {
      WriteStream(StreamFor(server_->request(call)), writer);
      return grpc::Status::OK;
    });
  }

  std::string WriteTrace(const std::string& text) {
    std::ofstream(dir_ / "trace") << text;
    return dir_ / "trace";
  }

  std::string ReadBack(const std::string& name) const {
    std::ifstream file(dir_ / name, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  }

  std::vector<uint32_t> TokensOf(int call) const {
    const v1::PrefillRequest request = server_->request(call);
    return {request.token_ids().begin(), request.token_ids().end()};
  }
};

TEST_F(BenchCommandTest, BenchPrintsOneLineForEveryLengthAndPreset) {
  EXPECT_EQ(Run("bench", {"--tokens-file", dir_ / "ids", "--lengths", "21", "--presets",
                          "exact,fast", "--requests", "3", "--concurrency", "2"}),
            0)
      << stderr_;
  EXPECT_EQ(server_->num_calls(), 2 * (1 + 3)) << "one to warm up";
  EXPECT_THAT(stdout_, HasSubstr("exact            21       3/3"));
  EXPECT_THAT(stdout_, HasSubstr("fast             21       3/3"));
}

TEST_F(BenchCommandTest, BenchAsksForAKvTypeAndTellsItsBytes) {
  testing::KvStreamSpec spec;
  spec.dtype = v1::KV_DTYPE_FP8_E4M3;
  stream_ = MakeStream(spec, MakeKv(spec));
  const std::vector<std::string> arguments = {
      "--tokens-file", dir_ / "ids", "--lengths",     "21",    "--requests", "2",
      "--kv-dtype",    "fp8_e4m3",   "--into-memory", "--json"};
  EXPECT_EQ(Run("bench", arguments), 0) << stderr_;
  EXPECT_EQ(server_->last_request().kv_dtype(), v1::KV_DTYPE_FP8_E4M3);
  const auto result = nlohmann::json::parse(stdout_)["results"][0];
  EXPECT_EQ(result["ok"], 2) << result;
  // Half of bf16, and scales of 3 layers, 6 pages, K and V, 2 heads.
  EXPECT_EQ(result["kv_bytes_per_prompt"], kv_.size() / 2 + 3 * 6 * 2 * 2 * sizeof(float));
}

TEST_F(BenchCommandTest, BenchCountsErrorsByCode) {
  Serve([this](int call, grpc::ServerContext&, PrefillWriter& writer) {
    if (call % 2 == 0) return RichStatus(grpc::StatusCode::RESOURCE_EXHAUSTED, "QUEUE_FULL");
    WriteStream(stream_, writer);
    return grpc::Status::OK;
  });
  EXPECT_EQ(Run("bench", {"--tokens-file", dir_ / "ids", "--lengths", "21", "--requests", "4",
                          "--warmup", "0", "--json"}),
            0);
  const auto result = nlohmann::json::parse(stdout_)["results"][0];
  EXPECT_EQ(result["ok"], 2);
  EXPECT_EQ(result["errors"]["RESOURCE_EXHAUSTED QUEUE_FULL"]["count"], 2);
  EXPECT_EQ(result["ttft_seconds"]["all"].size(), 2);
  EXPECT_EQ(result["density"], 0.75);
  EXPECT_EQ(result["exposed_transfer_seconds"]["p50"], 0.125);
  EXPECT_EQ(result["connections"], 1);
  EXPECT_GT(result["tokens_per_second"], 0.0);
}

TEST_F(BenchCommandTest, BenchRunsAnOpenLoop) {
  EXPECT_EQ(Run("bench", {"--tokens-file", dir_ / "ids", "--lengths", "21", "--requests", "10",
                          "--rate", "1000", "--json"}),
            0)
      << stderr_;
  EXPECT_EQ(nlohmann::json::parse(stdout_)["results"][0]["ok"], 10);
}

TEST_F(BenchCommandTest, BenchFailsWhenNothingWentWell) {
  Serve([](int, grpc::ServerContext&, PrefillWriter&) {
    return RichStatus(grpc::StatusCode::UNAVAILABLE, "DRAINING");
  });
  EXPECT_EQ(Run("bench", {"--lengths", "21", "--requests", "2"}), 75);
}

TEST_F(BenchCommandTest, BenchRefusesLengthsThatTheFileDoesNotHave) {
  EXPECT_EQ(Run("bench", {"--tokens-file", dir_ / "ids", "--lengths", "21,22"}), 2);
  EXPECT_THAT(stderr_, HasSubstr("has 21 tokens, --lengths wants 22"));
}

TEST_F(BenchCommandTest, BenchDrawsFromAMixOfLengthsAndPriorities) {
  ServeAnyPrompt();
  EXPECT_EQ(Run("bench", {"--lengths", "8:1,16:3", "--priorities", "0:1,5:1", "--requests", "40",
                          "--concurrency", "2", "--warmup", "0", "--json"}),
            0)
      << stderr_;
  const auto result = nlohmann::json::parse(stdout_)["results"][0];
  EXPECT_EQ(result["prompt_tokens"], "mix");
  EXPECT_EQ(result["ok"], 40);
  std::map<int, int> lengths, priorities;
  std::set<std::vector<uint32_t>> prompts;
  for (int call = 1; call <= 40; ++call) {
    ++lengths[static_cast<int>(TokensOf(call).size())];
    ++priorities[server_->request(call).priority()];
    prompts.insert(TokensOf(call));
  }
  EXPECT_EQ(lengths.size(), 2);
  EXPECT_GT(lengths[16], lengths[8]);
  EXPECT_THAT(priorities, ElementsAre(Key(0), Key(5)));
  EXPECT_EQ(prompts.size(), 40) << "no prompt twice";
}

TEST_F(BenchCommandTest, BenchReplaysATraceWithItsPrefixes) {
  ServeAnyPrompt();
  const std::string trace = WriteTrace(
      "{\"timestamp\": 7000, \"input_length\": 10, \"hash_ids\": [1, 2, 3]}\n"
      "{\"timestamp\": 7001, \"input_length\": 12, \"hash_ids\": [1, 2, 4]}\n"
      "{\"timestamp\": 7002, \"input_length\": 8, \"hash_ids\": [1, 2]}\n");
  EXPECT_EQ(Run("bench", {"--trace", trace, "--trace-block", "4", "--warmup", "0", "--concurrency",
                          "1", "--decode-holds-prefix", "--json"}),
            0)
      << stderr_;
  const std::vector<uint32_t> first = TokensOf(1), second = TokensOf(2);
  ASSERT_EQ(first.size(), 10);
  ASSERT_EQ(second.size(), 12);
  EXPECT_TRUE(std::equal(first.begin(), first.begin() + 8, second.begin()));
  EXPECT_NE(first[8], second[8]);
  EXPECT_EQ(server_->request(1).skip_tokens(), 0);
  EXPECT_EQ(server_->request(2).skip_tokens(), 8) << "the client holds two blocks";
  EXPECT_EQ(server_->request(3).skip_tokens(), 7) << "one token at least must come";
  const auto result = nlohmann::json::parse(stdout_)["results"][0];
  EXPECT_EQ(result["ok"], 3);
  EXPECT_EQ(result["skipped_tokens"], 15);
  EXPECT_EQ(result["prefix_hit_rate"], 0.5);
  EXPECT_EQ(result["predicted_ttft"]["count"], 3);
  EXPECT_GT(result["predicted_ttft"]["error_p50"], 1.0) << "1000 s were predicted";
}

TEST_F(BenchCommandTest, BenchSendsATraceWhenItWasDue) {
  ServeAnyPrompt();
  const std::string trace = WriteTrace(
      "{\"timestamp\": 40, \"input_length\": 4}\n{\"timestamp\": 0, \"input_length\": 3}\n"
      "{\"timestamp\": 80, \"input_length\": 5}\n{\"timestamp\": 99, \"input_length\": 6}\n");
  EXPECT_EQ(Run("bench", {"--trace", trace, "--speed", "2", "--max-prompts", "3", "--records",
                          dir_ / "records"}),
            0)
      << stderr_;
  std::vector<nlohmann::json> records;
  const std::string text = ReadBack("records");
  for (const auto line : absl::StrSplit(text, '\n', absl::SkipEmpty()))
    records.push_back(nlohmann::json::parse(line));
  ASSERT_EQ(records.size(), 3);
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(records[i]["tokens"], 3 + i);
    EXPECT_NEAR(records[i]["planned"].get<double>(), 0.02 * i, 1e-6);
    double last = 0;
    for (const char* time : {"planned", "sent", "accepted", "first_token", "all_kv", "ended"}) {
      EXPECT_GE(records[i][time], last) << time;
      last = records[i][time];
    }
    EXPECT_EQ(records[i]["outcome"], "ok");
  }
}

TEST_F(BenchCommandTest, BenchNamesTheLineOfATraceThatIsNone) {
  const std::string trace =
      WriteTrace("{\"timestamp\": 0, \"input_length\": 3}\n{\"timestamp\": -1}\n");
  EXPECT_EQ(Run("bench", {"--trace", trace}), 2);
  EXPECT_THAT(stderr_, HasSubstr(trace + ": line 2: timestamp"));
  EXPECT_EQ(server_->num_calls(), 0);
}

TEST_F(BenchCommandTest, BenchTellsRefusedFromFailed) {
  Serve([this](int call, grpc::ServerContext&, PrefillWriter& writer) {
    if (call == 1) return RichStatus(grpc::StatusCode::RESOURCE_EXHAUSTED, "QUEUE_FULL");
    WriteStream(StreamFor(server_->request(call)), writer, /*count=*/call == 2 ? 1 : -1);
    return call == 2 ? RichStatus(grpc::StatusCode::INTERNAL, "INTERNAL") : grpc::Status::OK;
  });
  EXPECT_EQ(Run("bench", {"--lengths", "8", "--requests", "4", "--warmup", "0", "--slo-ttft", "1h",
                          "--json", "--records", dir_ / "records.csv"}),
            0)
      << stderr_;
  const auto result = nlohmann::json::parse(stdout_)["results"][0];
  EXPECT_EQ(result["refused"], 1);
  EXPECT_EQ(result["failed"], 1);
  EXPECT_EQ(result["accepted"], 3);
  EXPECT_EQ(result["ok"], 2);
  EXPECT_GT(result["refusal_seconds"]["max"], 0.0);
  EXPECT_EQ(result["slo_attainment"], 0.5);
  EXPECT_THAT(ReadBack("records.csv"),
              HasSubstr("\"refused\",\"RESOURCE_EXHAUSTED QUEUE_FULL\"\n"));
}

TEST_F(BenchCommandTest, BenchShowsClassesAndThePicture) {
  ServeAnyPrompt();
  EXPECT_EQ(Run("bench", {"--lengths", "8", "--rate", "1000", "--requests", "5", "--slo-ttft", "1h",
                          "--plot", dir_ / "plot.svg"}),
            0)
      << stderr_;
  EXPECT_THAT(stdout_, HasSubstr("default, 8 tokens: 5 prompts in "));
  EXPECT_THAT(stdout_, HasSubstr("5 well, 0 refused, 0 failed"));
  EXPECT_THAT(stdout_, HasSubstr("prefix hit 50.0 %"));
  EXPECT_THAT(stdout_, HasSubstr("\n<= 2K           5        5 "));
  EXPECT_THAT(stdout_, HasSubstr("100.0 %\n"));
  EXPECT_THAT(ReadBack("plot.svg"), HasSubstr("headstart bench: default, 8 tokens"));
}

TEST_F(BenchCommandTest, BenchDrawsOneMeasurementOnly) {
  EXPECT_EQ(Run("bench", {"--lengths", "8,9", "--plot", dir_ / "plot.svg"}), 2);
  EXPECT_THAT(stderr_, HasSubstr("--plot shows one"));
}

TEST_F(BenchCommandTest, BenchGivesEveryRequestItsDeadline) {
  absl::Duration left;
  Serve([&](int, grpc::ServerContext& context, PrefillWriter&) {
    left = FromGrpcTime(context.raw_deadline()) - Instant::Now();
    return RichStatus(grpc::StatusCode::DEADLINE_EXCEEDED, "DEADLINE_UNREACHABLE");
  });
  EXPECT_EQ(
      Run("bench", {"--lengths", "8", "--requests", "1", "--warmup", "0", "--deadline", "1h"}), 75);
  EXPECT_GT(left, absl::Minutes(58));
  EXPECT_LT(left, absl::Minutes(62)) << "gRPC rounds up";
}

TEST_F(BenchCommandTest, BenchSharesNoPrefixesOfText) {
  Run("bench", {"--tokens-file", dir_ / "ids", "--lengths", "21", "--requests", "1"});
  EXPECT_EQ(server_->last_request().prefix_reuse(), v1::PREFIX_REUSE_NONE);
  Run("bench", {"--lengths", "21", "--requests", "1"});
  EXPECT_EQ(server_->last_request().prefix_reuse(), v1::PREFIX_REUSE_SAME_ATTENTION);
  Run("bench", {"--lengths", "21", "--requests", "1", "--prefix-reuse", "dense"});
  EXPECT_EQ(server_->last_request().prefix_reuse(), v1::PREFIX_REUSE_DENSE);
}

TEST_F(BenchCommandTest, BenchRefusesWeightsThatAreNone) {
  for (const char* lengths : {"0", "8:0", "8:x", "8:-1", "a:1", "8:nan"}) {
    EXPECT_EQ(Run("bench", {"--lengths", lengths}), 2) << lengths;
    EXPECT_THAT(stderr_, HasSubstr("is not VALUE or VALUE:WEIGHT")) << lengths;
  }
}

}  // namespace
}  // namespace headstart
