// What operators see: /metrics, and health. The port itself: admin_port_test.cc.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "server/ops/metric_table.h"
#include "tests/server/server_fixture.h"
#include "tests/testing/status_matchers.h"

namespace headstart::testing {
namespace {

using ::testing::HasSubstr;

const char* TypeName(MetricType type) {
  switch (type) {
    case MetricType::kCounter:
      return "counter";
    case MetricType::kGauge:
      return "gauge";
    case MetricType::kHistogram:
      return "histogram";
  }
  return "";
}

// What /metrics says about one metric.
struct LiveMetric {
  std::string type;
  std::string help;
  std::set<std::string> labels;
  int samples = 0;
};

// The metric that a sample belongs to: histograms have three kinds of them.
std::string FamilyOf(const std::string& sample, const std::map<std::string, LiveMetric>& families) {
  for (const char* suffix : {"_bucket", "_sum", "_count"}) {
    if (!absl::EndsWith(sample, suffix)) continue;
    const std::string base = sample.substr(0, sample.size() - std::string(suffix).size());
    if (families.count(base) > 0 && families.at(base).type == "histogram") return base;
  }
  return sample;
}

std::map<std::string, LiveMetric> Parse(const std::string& text) {
  std::map<std::string, LiveMetric> out;
  for (const std::string& line :
       std::vector<std::string>(absl::StrSplit(text, '\n', absl::SkipEmpty()))) {
    if (absl::StartsWith(line, "# ")) {
      const std::vector<std::string> words = absl::StrSplit(line, absl::MaxSplits(' ', 3));
      (words[1] == "TYPE" ? out[words[2]].type : out[words[2]].help) = words[3];
      continue;
    }
    const size_t name_end = line.find_first_of("{ ");
    LiveMetric& metric = out[FamilyOf(line.substr(0, name_end), out)];
    ++metric.samples;
    // Values of ours hold no quotes, braces or equal signs.
    const size_t labels_end = line.find('}');
    if (line[name_end] != '{') continue;
    const std::string labels = line.substr(name_end + 1, labels_end - name_end - 1);
    for (const std::string& label :
         std::vector<std::string>(absl::StrSplit(labels, "\",", absl::SkipEmpty()))) {
      metric.labels.insert(label.substr(0, label.find('=')));
    }
  }
  return out;
}

class AdminTest : public ServerTest {
 protected:
  // Dense, so that every one teaches.
  static v1::PrefillRequest Dense(int64_t count) {
    v1::PrefillRequest request = Prompt(count);
    request.mutable_attention()->set_preset(v1::ATTENTION_PRESET_EXACT);
    return request;
  }

  void RunUntilSpeedIsKnown() {
    for (int64_t i = 0; i < CostModel::kMinSteps; ++i) {
      EXPECT_EQ(Metric(kDrain), -1);
      ASSERT_TRUE(Run(Dense(300)).status.ok());
    }
    EXPECT_EQ(Metric(kDrain), 0);
  }

  static constexpr char kDrain[] = "headstart_predicted_drain_seconds{model=\"tiny\"}";
};

TEST_F(AdminTest, ShowsEveryMetricOfTheTableAndNoOther) {
  Start();
  RunUntilSpeedIsKnown();
  std::map<std::string, LiveMetric> live = Parse(Get("/metrics").body);
  for (const MetricSpec& spec : metric::kAll) {
    ASSERT_EQ(live.count(spec.name), 1u) << spec.name;
    LiveMetric& metric = live[spec.name];
    EXPECT_EQ(metric.type, TypeName(spec.type)) << spec.name;
    EXPECT_EQ(metric.help, spec.help) << spec.name;
    if (spec.name == std::string(metric::kTlsNotAfter.name)) {  // without TLS: tls_test.cc
      live.erase(spec.name);
      continue;
    }
    EXPECT_GT(metric.samples, 0) << spec.name;
    metric.labels.erase("le");
    const std::set<std::string> labels = absl::StrSplit(spec.labels, ',', absl::SkipEmpty());
    EXPECT_EQ(metric.labels, labels) << spec.name;
    live.erase(spec.name);
  }
  EXPECT_TRUE(live.empty()) << live.begin()->first;
}

TEST(MetricTableTest, IsTheTableOfTheReadme) {
  std::vector<std::string> expected, written;
  for (const MetricSpec& spec : metric::kAll) {
    const std::vector<std::string> labels = absl::StrSplit(spec.labels, ',', absl::SkipEmpty());
    expected.push_back(absl::StrCat("| `", spec.name, "` | ", TypeName(spec.type), " | ",
                                    absl::StrJoin(labels, ", "), " | ", spec.help, " |"));
  }
  std::ifstream readme(HEADSTART_SOURCE_DIR "/server/REFERENCE.md");
  for (std::string line; std::getline(readme, line);) {
    if (absl::StartsWith(line, "| `headstart_") || absl::StartsWith(line, "| `process_")) {
      written.push_back(line);
    }
  }
  EXPECT_EQ(written, expected);
}

TEST_F(AdminTest, PromtoolFindsNothing) {
  if (std::string(HEADSTART_PROMTOOL).empty()) GTEST_SKIP() << "no promtool";
  Start();
  ASSERT_TRUE(Run(Prompt(300)).status.ok());
  ASSERT_OK(WriteFile(dir_ / "metrics", Get("/metrics").body));
  FILE* promtool = popen(
      absl::StrCat(HEADSTART_PROMTOOL " check metrics < ", dir_ / "metrics", " 2>&1").c_str(), "r");
  std::string complaints;
  for (int c = fgetc(promtool); c != EOF; c = fgetc(promtool))
    complaints.push_back(static_cast<char>(c));
  EXPECT_EQ(pclose(promtool), 0);
  EXPECT_EQ(complaints, "");
}

TEST_F(AdminTest, HostileClientsAddNoSeries) {
  Start();
  RunUntilSpeedIsKnown();
  v1::PrefillRequest unknown = Prompt(5);
  unknown.set_model("warm-up");
  EXPECT_EQ(Run(unknown).status.error_code(), grpc::StatusCode::NOT_FOUND);
  const auto count_lines = [this] {
    const std::string body = Get("/metrics").body;
    return std::count(body.begin(), body.end(), '\n');
  };
  const auto before = count_lines();
  const auto stub = NewStub();
  for (int i = 0; i < 1000; ++i) {
    v1::PrefillRequest request = Prompt(i % 3);
    request.set_request_id(absl::StrCat("request-", i));
    if (i % 2 == 0) request.set_model(absl::StrCat("model-", i, "\"}\n# TYPE evil counter"));
    OpenCall(stub.get(), request, [i](grpc::ClientContext& context) {
      context.AddMetadata("x-user", absl::StrCat("user-", i));
    }).Finish();
  }
  EXPECT_EQ(count_lines(), before);
  EXPECT_EQ(Metric("headstart_requests_total{code=\"NOT_FOUND\",model=\"_unknown\","
                   "reason=\"UNKNOWN_MODEL\"}"),
            501);
}

TEST_F(AdminTest, RequestSeriesAreThereBeforeTheFirstRequest) {
  Start();
  for (const char* series :
       {"headstart_requests_total{code=\"OK\",model=\"tiny\",reason=\"NONE\"}",
        "headstart_requests_total{code=\"INTERNAL\",model=\"tiny\",reason=\"NONFINITE_OUTPUT\"}",
        "headstart_requests_total{code=\"NOT_FOUND\",model=\"_unknown\",reason=\"UNKNOWN_MODEL\"}",
        "headstart_kv_transfer_failures_total{model=\"tiny\",reason=\"CLIENT_STALLED\"}",
        "headstart_attention_executed_blocks_total{layer=\"1\",model=\"tiny\"}",
        "headstart_time_to_first_token_seconds_count{model=\"tiny\"}",
        "headstart_connections_shed_total{reason=\"no_file_descriptors\"}"}) {
    EXPECT_EQ(Metric(series), 0) << series;
  }
}

TEST_F(AdminTest, CountsWhatARequestDid) {
  Start();
  ASSERT_TRUE(Run(Dense(600)).status.ok());
  EXPECT_EQ(Metric("headstart_requests_total{code=\"OK\",model=\"tiny\",reason=\"NONE\"}"), 1);
  EXPECT_EQ(Metric("headstart_prompt_tokens_total{model=\"tiny\",source=\"computed\"}"), 600);
  EXPECT_EQ(Metric("headstart_prompt_tokens_sum{model=\"tiny\"}"), 600);
  EXPECT_EQ(Metric("headstart_kv_bytes_sent_total{model=\"tiny\",stripes=\"1\"}"), 600 * 1024);
  EXPECT_EQ(Metric("headstart_attention_density_ratio_sum{model=\"tiny\"}"), 1);
  // 5 query blocks, 15 causal pairs, 4 heads; the last layer's attention runs for the last row
  // only.
  EXPECT_EQ(Metric("headstart_attention_causal_blocks_total{layer=\"0\",model=\"tiny\"}"), 60);
  EXPECT_EQ(Metric("headstart_attention_executed_blocks_total{layer=\"0\",model=\"tiny\"}"), 60);
  EXPECT_EQ(Metric("headstart_attention_causal_blocks_total{layer=\"1\",model=\"tiny\"}"), 20);
  EXPECT_EQ(Metric("headstart_attention_predicted_blocks_total{layer=\"1\",model=\"tiny\"}"), 20);
  EXPECT_EQ(Metric("headstart_layer_sparsity_ratio{layer=\"1\",model=\"tiny\"}"), 0);
  EXPECT_EQ(Metric("headstart_layers_done_total"), 2);
  EXPECT_EQ(Metric("headstart_tickets_acquired_total{model=\"tiny\"}"), 1);
  EXPECT_EQ(Metric("headstart_tickets_released_total{model=\"tiny\"}"), 1);
  EXPECT_EQ(Metric("headstart_kv_pool_blocks_acquired_total"), 5);
  const double parts = Metric("headstart_selection_seconds_sum{model=\"tiny\"}") +
                       Metric("headstart_attention_seconds_sum{model=\"tiny\"}") +
                       Metric("headstart_other_compute_seconds_sum{model=\"tiny\"}") +
                       Metric("headstart_exposed_transfer_seconds_sum{model=\"tiny\"}");
  const double total = Metric("headstart_time_to_first_token_seconds_sum{model=\"tiny\"}");
  EXPECT_LE(parts, total);
  EXPECT_GT(parts, 0);
  EXPECT_EQ(Metric("headstart_queue_seconds_count{model=\"tiny\"}"), 1);
  EXPECT_EQ(Metric("headstart_kv_overlap_ratio_count{model=\"tiny\"}"), 1);
  EXPECT_EQ(Metric("headstart_host_kv_bytes{state=\"used\"}"), 0);
  EXPECT_GT(Metric("headstart_host_kv_bytes{state=\"free\"}"), 0);
}

TEST_F(AdminTest, CountsEstimatesFromTheFirstOneOn) {
  Start();
  RunUntilSpeedIsKnown();
  EXPECT_EQ(Metric("headstart_ttft_estimate_error_ratio_count{model=\"tiny\"}"), 0);
  ASSERT_TRUE(Run(Dense(300)).status.ok());
  EXPECT_EQ(Metric("headstart_ttft_estimate_error_ratio_count{model=\"tiny\"}"), 1);
}

TEST_F(AdminTest, ShowsHowThePrefixCacheDoes) {
  options_.kv_pool_tokens = 640;
  Start();
  EXPECT_EQ(Metric("headstart_kv_pool_blocks{state=\"free\"}"), 5);
  ASSERT_TRUE(Run(Dense(600)).status.ok());
  ASSERT_TRUE(Run(Dense(600)).status.ok());
  EXPECT_EQ(Metric("headstart_prompt_tokens_total{model=\"tiny\",source=\"computed\"}"), 688);
  EXPECT_EQ(Metric("headstart_prompt_tokens_total{model=\"tiny\",source=\"prefix_cache\"}"), 512);
  EXPECT_EQ(Metric("headstart_kv_pool_blocks{state=\"free\"}"), 1);
  EXPECT_EQ(Metric("headstart_kv_pool_blocks{state=\"cached\"}"), 4);
  EXPECT_EQ(Metric("headstart_kv_cache_utilization_ratio"), 0);
  EXPECT_EQ(Metric("headstart_kv_pool_evictions_total"), 0);
  v1::PrefillRequest other = Dense(600);
  other.set_token_ids(0, 17);
  ASSERT_TRUE(Run(other).status.ok());
  EXPECT_EQ(Metric("headstart_kv_pool_evictions_total"), 4);
  EXPECT_EQ(Metric("headstart_steps_total{model=\"tiny\",kind=\"main\"}"), 3);
  EXPECT_EQ(Metric("headstart_step_pieces_total{model=\"tiny\"}"), 3);
}

TEST_F(AdminTest, CountsDenseFallbacksByReason) {
  Start();
  v1::PrefillRequest request = Prompt(600);
  ASSERT_TRUE(Run(request).status.ok());  // below the preset's limit
  EXPECT_EQ(
      Metric("headstart_attention_fallback_total{model=\"tiny\",reason=\"below_dense_limit\"}"), 1);
  request.mutable_attention()->set_dense_below_tokens(0);
  request.mutable_attention()->set_gamma(1);  // keeps everything: denser than worth it
  ASSERT_TRUE(Run(request).status.ok());
  EXPECT_EQ(Metric("headstart_attention_fallback_total{model=\"tiny\",reason=\"density\"}"), 2);
}

TEST_F(AdminTest, HealthGoesThroughTheListener) {
  Start();
  EXPECT_EQ(Get("/healthz").status, 200);
  server_->Drain();
  server_->WaitForEnd();
  EXPECT_OK(server_->Shutdown());  // the admin server still runs, the listener does not
  EXPECT_EQ(Get("/healthz").status, 503);
}

TEST_F(AdminTest, CanBeLeftOut) {
  options_.admin_listen = "";
  Start();
  EXPECT_EQ(server_->admin_port(), 0);
  EXPECT_TRUE(Run(Prompt(5)).status.ok());
}

TEST_F(AdminTest, TakenPortsAreErrorsThatNameThem) {
  Start();
  const auto expect_taken = [this](const std::string& listen, const std::string& admin, int port) {
    ServerOptions second = options_;
    second.listen = listen;
    second.admin_listen = admin;
    EXPECT_THAT(Server::Start(second, [this] { return MakeEngine(); }),
                StatusIs(absl::StatusCode::kUnavailable, HasSubstr(std::to_string(port))));
  };
  expect_taken(target(), "127.0.0.1:0", server_->port());
  expect_taken("127.0.0.1:0", absl::StrCat("127.0.0.1:", server_->admin_port()),
               server_->admin_port());
}

}  // namespace
}  // namespace headstart::testing
