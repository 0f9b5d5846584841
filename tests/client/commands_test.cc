// `headstart request` and `headstart bench`, from the command line to the exit code, against a
// made-up server.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <fstream>
#include <iterator>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "CLI/CLI.hpp"
#include "absl/strings/str_cat.h"
#include "client/commands/bench_command.h"
#include "client/commands/request_command.h"
#include "tests/client/fake_server.h"
#include "tests/client/kv_stream.h"
#include "tests/testing/temp_dir.h"

namespace headstart {
namespace {

using testing::FakeServer;
using ::testing::HasSubstr;
using testing::PrefillWriter;
using testing::RichStatus;
using testing::WriteStream;

class CommandsTest : public ::testing::Test {
 protected:
  CommandsTest() : kv_(MakeKv(spec_)), stream_(MakeStream(spec_, kv_)) {
    stream_[0].mutable_accepted()->set_request_id("\x1b[31mred");
    testing::EditCompleted(&stream_.back(), [](v1::Completed& completed) {
      v1::PrefillStatistics& statistics = *completed.mutable_statistics();
      statistics.mutable_attention()->set_nanos(250'000'000);
      statistics.mutable_exposed_transfer()->set_nanos(125'000'000);
      statistics.mutable_total()->set_seconds(1);
      statistics.set_executed_blocks(3);
      statistics.set_causal_blocks(4);
      completed.mutable_manifest()->set_layer_density(1, 0.5f);
    });
    Serve([this](int, grpc::ServerContext&, PrefillWriter& writer) {
      WriteStream(stream_, writer);
      return grpc::Status::OK;
    });
    std::ofstream ids(dir_ / "ids");
    const v1::PrefillRequest request = RequestFor(spec_);
    for (const uint32_t id : request.token_ids()) ids << id << "\n";
  }

  void Serve(FakeServer::Handler handler) {
    server_ = std::make_unique<FakeServer>(std::move(handler));
  }

  // Runs a command line; the exit code. Output in stdout_ and stderr_.
  int Run(const std::string& command, std::vector<std::string> arguments) {
    CLI::App app;
    int exit_code = -1;
    AddRequestCommand(app, [&](int code) { exit_code = code; });
    AddBenchCommand(app, [&](int code) { exit_code = code; });
    arguments.insert(arguments.begin(), {command, "--target", server_->target()});
    std::reverse(arguments.begin(), arguments.end());
    ::testing::internal::CaptureStdout();
    ::testing::internal::CaptureStderr();
    try {
      app.parse(arguments);
    } catch (const CLI::ParseError& error) {
      stderr_ = error.what();
      exit_code = 2;
    }
    stdout_ = ::testing::internal::GetCapturedStdout();
    stderr_ += ::testing::internal::GetCapturedStderr();
    return exit_code;
  }

  const testing::KvStreamSpec spec_;
  const std::vector<std::byte> kv_;
  testing::KvStream stream_;
  testing::TempDir dir_;
  std::unique_ptr<FakeServer> server_;
  std::string stdout_, stderr_;
};

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

TEST_F(CommandsTest, BenchPrintsOneLineForEveryLengthAndPreset) {
  EXPECT_EQ(Run("bench", {"--tokens-file", dir_ / "ids", "--lengths", "21", "--presets",
                          "exact,fast", "--requests", "3", "--concurrency", "2"}),
            0)
      << stderr_;
  EXPECT_EQ(server_->num_calls(), 2 * (1 + 3)) << "one to warm up";
  EXPECT_THAT(stdout_, HasSubstr("exact            21       3/3"));
  EXPECT_THAT(stdout_, HasSubstr("fast             21       3/3"));
}

TEST_F(CommandsTest, BenchCountsErrorsByCode) {
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

TEST_F(CommandsTest, BenchRunsAnOpenLoop) {
  EXPECT_EQ(Run("bench", {"--tokens-file", dir_ / "ids", "--lengths", "21", "--requests", "10",
                          "--rate", "1000", "--json"}),
            0)
      << stderr_;
  EXPECT_EQ(nlohmann::json::parse(stdout_)["results"][0]["ok"], 10);
}

TEST_F(CommandsTest, BenchFailsWhenNothingWentWell) {
  Serve([](int, grpc::ServerContext&, PrefillWriter&) {
    return RichStatus(grpc::StatusCode::UNAVAILABLE, "DRAINING");
  });
  EXPECT_EQ(Run("bench", {"--lengths", "21", "--requests", "2"}), 75);
}

TEST_F(CommandsTest, BenchRefusesLengthsThatTheFileDoesNotHave) {
  EXPECT_EQ(Run("bench", {"--tokens-file", dir_ / "ids", "--lengths", "21,22"}), 2);
  EXPECT_THAT(stderr_, HasSubstr("has 21 tokens, --lengths wants 22"));
}

}  // namespace
}  // namespace headstart
