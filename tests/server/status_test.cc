// The status page and the JSON that it draws.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <nlohmann/json.hpp>
#include <string>

#include "absl/strings/str_cat.h"
#include "kernels/base/instant.h"
#include "server/ops/recent_prompts.h"
#include "server/ops/status_report.h"
#include "tests/server/server_fixture.h"
#include "tests/testing/notification.h"
#include "tests/testing/status_matchers.h"

namespace headstart::testing {
namespace {

using nlohmann::json;
using ::testing::HasSubstr;

// ---- the last prompts

CallRecord Ended(const std::string& id) {
  CallRecord record;
  record.request_id = id;
  record.accepted = true;
  record.accepted_at = Instant();
  record.ended_at = Instant() + absl::Seconds(10);
  return record;
}

CallRecord Computed(const std::string& id) {
  CallRecord record = Ended(id);
  PrefillResult result;
  result.accepted_at = Instant();
  result.started_at = Instant() + absl::Seconds(1);
  result.computed_at = Instant() + absl::Seconds(9);
  result.selection_seconds = 1;
  result.attention_seconds = 2;
  result.compute_seconds = 4;
  result.gave_way_seconds = 3;
  result.layer_density = {1, 0.25};
  result.layer_head_budget = {0, 0, 0, 0.12345};
  result.executed_blocks = 5;
  result.causal_blocks = 10;
  record.sent.result = std::make_shared<PrefillResult>(std::move(result));
  return record;
}

TEST(RecentPromptsTest, TakesTheTimeApart) {
  RecentPrompts prompts;
  prompts.Add(Computed("a"), absl::OkStatus());
  const auto got = prompts.Get();
  ASSERT_EQ(got.size(), 1u);
  ASSERT_TRUE(got[0]->shares.has_value());
  EXPECT_EQ(got[0]->shares->queue, absl::Seconds(1));
  EXPECT_EQ(got[0]->shares->selection, absl::Seconds(1));
  EXPECT_EQ(got[0]->shares->attention, absl::Seconds(2));
  EXPECT_EQ(got[0]->shares->other_compute, absl::Seconds(1));
  EXPECT_EQ(got[0]->shares->gave_way, absl::Seconds(3));
  EXPECT_EQ(got[0]->shares->exposed_transfer, absl::Seconds(2));
  EXPECT_EQ(got[0]->total, absl::Seconds(10));
  EXPECT_EQ(got[0]->density, 0.5);
  EXPECT_TRUE(got[0]->is_sparse());
}

TEST(RecentPromptsTest, KeepsTheLastOnesThatWereAccepted) {
  RecentPrompts prompts;
  prompts.Add(CallRecord(), absl::ResourceExhaustedError("full"));
  for (int i = 0; i < 130; ++i) {
    prompts.Add(Ended(absl::StrCat(i)), absl::CancelledError("the client went"));
  }
  const auto got = prompts.Get();
  ASSERT_EQ(got.size(), RecentPrompts::kCapacity);
  EXPECT_EQ(got.front()->request_id, "30");
  EXPECT_EQ(got.front()->number, 31);
  EXPECT_EQ(got.back()->request_id, "129");
  EXPECT_EQ(got.back()->code, absl::StatusCode::kCancelled);
  EXPECT_FALSE(got.back()->shares.has_value());
}

// ---- the JSON

TEST(StatusJsonTest, SaysWhatTheReportSays) {
  RecentPrompts prompts;
  prompts.Add(Computed("sparse"), absl::OkStatus());
  prompts.Add(Ended("gone"), absl::CancelledError("the client went"));
  StatusReport report;
  report.now = Instant() + absl::Seconds(12);
  report.model = "m\xff\"<script>";  // a folder may have any name
  report.requests.push_back({.request_id = "r",
                             .num_tokens = 7,
                             .priority = -1,
                             .position = 5,
                             .accepted_at = Instant() + absl::Seconds(2),
                             .state = RequestState::kPaused});
  report.prompts = prompts.Get();
  const json got = json::parse(StatusJson(report));
  EXPECT_EQ(got["server"]["model"], "m\xef\xbf\xbd\"<script>");
  EXPECT_EQ(got["requests"], json::parse(R"([{"request_id": "r", "tokens": 7, "priority": -1,
            "position": 5, "state": "paused", "age_seconds": 10.0}])"));
  EXPECT_EQ(got["prompts"][0], json::parse(R"({"number": 1, "request_id": "sparse", "code": "OK",
            "reason": "NONE", "tokens": 0, "cached_tokens": 0, "detached": false,
            "ended_seconds_ago": 2.0, "total_seconds": 10.0, "density": 0.5,
            "layer_density": [1.0, 0.25], "ttft_seconds": {"queue": 1.0, "selection": 1.0,
            "attention": 2.0, "other_compute": 1.0, "gave_way": 3.0, "exposed_transfer": 2.0}})"));
  EXPECT_EQ(got["prompts"][1]["code"], "CANCELLED");
  EXPECT_EQ(got["prompts"][1]["ttft_seconds"], nullptr);
  EXPECT_EQ(got["head_budget"], json::parse(R"({"request_id": "sparse", "tokens": 0,
            "layers": [[0.0, 0.0], [0.0, 0.123]]})"));
}

TEST(StatusJsonTest, StaysSmall) {
  RecentPrompts prompts;
  CallRecord record = Computed(std::string(128, 'x'));
  PrefillResult result = *record.sent.result;
  result.layer_density.assign(80, 0.1234567f);
  result.layer_head_budget.assign(80 * 64, 0.1234567f);
  record.sent.result = std::make_shared<PrefillResult>(result);
  for (int i = 0; i < 1000; ++i) prompts.Add(record, absl::OkStatus());
  StatusReport report;
  report.prompts = prompts.Get();
  report.requests.resize(StatusReport::kMaxRequests);
  EXPECT_LT(StatusJson(report).size(), 256u << 10);
}

// ---- a live server

class StatusTest : public ServerTest {
 protected:
  json Status() const { return json::parse(Get("/status.json").body); }
};

TEST_F(StatusTest, ShowsWhatRunsAndWaits) {
  Start();
  EXPECT_EQ(Status()["requests"], json::array());
  Barrier barrier(backend_, "Attention", 0);
  const auto stub = NewStub();
  v1::PrefillRequest request = Prompt(300);
  request.set_request_id("runs");
  OpenCall running(stub.get(), request);
  barrier.WaitUntilReached();
  request = Prompt(20);
  request.set_request_id("waits");
  OpenCall waiting(stub.get(), request);
  WaitForQueued(1);
  const json got = Status();
  ASSERT_EQ(got["requests"].size(), 2u);
  EXPECT_EQ(got["requests"][0]["request_id"], "runs");
  EXPECT_EQ(got["requests"][0]["state"], "computing");
  EXPECT_EQ(got["requests"][0]["tokens"], 300);
  EXPECT_EQ(got["requests"][0]["position"], 300);
  EXPECT_EQ(got["requests"][1]["request_id"], "waits");
  EXPECT_EQ(got["requests"][1]["state"], "waiting");
  EXPECT_EQ(got["requests"][1]["position"], 0);
  EXPECT_GE(got["requests"][0]["age_seconds"], got["requests"][1]["age_seconds"]);
  EXPECT_EQ(got["load"]["inflight_requests"], 2);
  EXPECT_EQ(got["load"]["queued_tokens"], 20);
  EXPECT_EQ(got["pages"]["all"].get<int>() - got["pages"]["free"].get<int>(), 3);
  EXPECT_GT(got["host_bytes"]["all"], got["host_bytes"]["free"]);
  barrier.Open();
  EXPECT_TRUE(running.Finish().status.ok());
  EXPECT_TRUE(waiting.Finish().status.ok());
}

TEST_F(StatusTest, ShowsTheLastPrompts) {
  Start();
  v1::PrefillRequest request = Prompt(1000);
  request.set_request_id("sparse");
  request.mutable_attention()->set_dense_below_tokens(0);
  request.mutable_attention()->set_floor_tokens(128);
  request.mutable_attention()->set_gamma(0.05);
  request.mutable_attention()->set_dense_tail_blocks(0);
  ASSERT_TRUE(Run(request).status.ok());
  request = Prompt(10);
  request.set_request_id("dense");
  ASSERT_TRUE(Run(request).status.ok());
  const json got = Status();
  EXPECT_EQ(got["server"]["model"], "tiny");
  EXPECT_EQ(got["server"]["phase"], "serving");
  EXPECT_EQ(got["server"]["ready"], true);
  EXPECT_EQ(got["server"]["layers"], 2);
  EXPECT_EQ(got["totals"]["prompt_tokens"], 1010);
  EXPECT_EQ(got["totals"]["kv_bytes"], 1010 * 1024);
  ASSERT_EQ(got["prompts"].size(), 2u);
  const json& sparse = got["prompts"][0];
  EXPECT_EQ(sparse["request_id"], "sparse");
  EXPECT_EQ(sparse["layer_density"].size(), 2u);
  EXPECT_LT(sparse["density"], 1);
  double sum = 0;
  for (const auto& [name, seconds] : sparse["ttft_seconds"].items()) sum += seconds.get<double>();
  EXPECT_NEAR(sum, sparse["total_seconds"], 1e-5);
  EXPECT_EQ(got["head_budget"]["request_id"], "sparse");
  ASSERT_EQ(got["head_budget"]["layers"].size(), 2u);
  ASSERT_EQ(got["head_budget"]["layers"][0].size(), 4u);
  EXPECT_GT(got["head_budget"]["layers"][0][0], 0);
}

TEST_F(StatusTest, AnswersWhileTheModelLoads) {
  Notification may_load;
  ASSERT_OK(StartLoading([&] {
    may_load.WaitForNotification();
    return MakeEngine();
  }));
  const json got = Status();
  EXPECT_EQ(got["server"]["phase"], "loading");
  EXPECT_EQ(got["server"]["ready"], false);
  EXPECT_EQ(got["requests"], json::array());
  may_load.Notify();
  ASSERT_OK(server_->WaitUntilLoaded());
}

TEST_F(StatusTest, PageUsesNothingFromElsewhere) {
  Start();
  const HttpReply page = Get("/");
  EXPECT_EQ(page.status, 200);
  EXPECT_EQ(page.Header("Content-Type"), "text/html; charset=utf-8");
  EXPECT_EQ(page.Header("Cache-Control"), "no-store");
  EXPECT_THAT(page.Header("Content-Security-Policy"),
              HasSubstr("default-src 'self' 'unsafe-inline'"));
  EXPECT_THAT(page.body, HasSubstr("fetch(\"status.json\""));
  // The one address is the name of SVG's elements.
  std::string rest = page.body;
  const std::string svg = "\"http://www.w3.org/2000/svg\"";
  ASSERT_NE(rest.find(svg), std::string::npos);
  rest.erase(rest.find(svg), svg.size());
  for (const char* elsewhere : {"http:", "https:", "//cdn", "@import", "url(", "innerHTML"}) {
    EXPECT_EQ(rest.find(elsewhere), std::string::npos) << elsewhere;
  }
  const int port = server_->admin_port();
  const HttpReply head = Exchange(port, HttpHead("HEAD", "/status.json"));
  EXPECT_EQ(head.status, 200);
  EXPECT_EQ(head.Header("Cache-Control"), "no-store");
  EXPECT_EQ(Exchange(port, HttpHead("POST", "/")).status, 405);
}

TEST_F(StatusTest, BrowsersKeepNoConnection) {
  Start();
  const std::string keep = HttpHead("GET", "/status.json", "Connection: keep-alive\r\n");
  EXPECT_EQ(Exchange(server_->admin_port(), keep).Header("Connection"), "close");
}

}  // namespace
}  // namespace headstart::testing
