// Which calls are traced, and what their spans say.
#include "server/ops/tracer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/error.h"
#include "kernels/base/instant.h"
#include "server/ops/call_spans.h"

namespace headstart {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;

class NoSink final : public SpanSink {
 public:
  absl::StatusOr<int64_t> Send(const TraceExport&, Instant) override { return 0; }
  void Cancel() override {}
};

class TracerTest : public ::testing::Test {
 protected:
  static TraceContext Context(bool sampled) { return {NewTraceId(), NewSpanId(), sampled}; }

  SpanExporter exporter_{{}, {}, std::make_unique<NoSink>()};
};

// ---- who is traced

TEST_F(TracerTest, ObeysTheParent) {
  const Tracer tracer(0.0, &exporter_);
  const TraceContext parent = Context(true);
  const CallTrace trace = tracer.Begin(parent);
  EXPECT_EQ(trace.span.trace_id, parent.trace_id);
  EXPECT_EQ(trace.parent_id, parent.span_id);
  EXPECT_NE(trace.span.span_id, parent.span_id);
  EXPECT_TRUE(trace.span.sampled);
  EXPECT_FALSE(Tracer(1.0, &exporter_).Begin(Context(false)).span.sampled);
}

TEST_F(TracerTest, SamplesAShareOfTheOthers) {
  const auto count = [this](double ratio) {
    const Tracer tracer(ratio, &exporter_);
    int sampled = 0;
    for (int i = 0; i < 4000; ++i) sampled += tracer.Begin(std::nullopt).span.sampled;
    return sampled;
  };
  EXPECT_EQ(count(0.0), 0);
  EXPECT_EQ(count(1.0), 4000);
  EXPECT_NEAR(count(0.25), 1000, 250);  // nine standard deviations
}

TEST_F(TracerTest, WithoutExporterOnlyTheTraceIsKept) {
  Tracer tracer(1.0, nullptr);
  const TraceContext parent = Context(true);
  const CallTrace trace = tracer.Begin(parent);
  EXPECT_EQ(trace.span.trace_id, parent.trace_id);
  EXPECT_FALSE(trace.span.sampled);
  EXPECT_EQ(tracer.Begin(std::nullopt).span.trace_id, "");
}

TEST_F(TracerTest, AFetchBelongsToItsPrompt) {
  Tracer tracer(1.0, &exporter_);
  const CallTrace prompt = tracer.Begin(std::nullopt);
  tracer.NoteFetchId("id", prompt);
  CallTrace fetch = tracer.Begin(std::nullopt);
  tracer.Join("id", &fetch);
  EXPECT_EQ(fetch.span.trace_id, prompt.span.trace_id);
  EXPECT_EQ(fetch.parent_id, prompt.span.span_id);
  EXPECT_FALSE(fetch.link.has_value());

  const TraceContext parent = Context(true);
  CallTrace own = tracer.Begin(parent);
  tracer.Join("id", &own);
  EXPECT_EQ(own.span.trace_id, parent.trace_id);
  EXPECT_EQ(own.parent_id, parent.span_id);
  EXPECT_EQ(own.link, prompt.span);

  CallTrace stranger = tracer.Begin(std::nullopt);
  const std::string trace_id = stranger.span.trace_id;
  tracer.Join("another", &stranger);
  EXPECT_EQ(stranger.span.trace_id, trace_id);
}

TEST_F(TracerTest, AFetchIsSampledAsItsPrompt) {
  Tracer all(1.0, &exporter_);
  all.NoteFetchId("id", all.Begin(Context(false)));
  CallTrace fetch = all.Begin(std::nullopt);
  all.Join("id", &fetch);
  EXPECT_FALSE(fetch.span.sampled);

  Tracer none(0.0, &exporter_);
  none.NoteFetchId("id", none.Begin(Context(true)));
  fetch = none.Begin(std::nullopt);
  none.Join("id", &fetch);
  EXPECT_TRUE(fetch.span.sampled);
  EXPECT_EQ(fetch.span.span_id.size(), 8u);
}

TEST_F(TracerTest, ForgetsOldFetchIds) {
  Tracer tracer(1.0, &exporter_);
  for (size_t i = 0; i <= Tracer::kMaxFetchIds; ++i) {
    tracer.NoteFetchId(absl::StrCat(i), tracer.Begin(std::nullopt));
  }
  CallTrace first = tracer.Begin(std::nullopt), second = tracer.Begin(std::nullopt);
  tracer.Join("0", &first);
  tracer.Join("1", &second);
  EXPECT_TRUE(first.parent_id.empty());
  EXPECT_FALSE(second.parent_id.empty());
}

// ---- what spans say

Instant At(double seconds) { return Instant() + absl::Seconds(seconds); }
// The wall clock at At(12).
const absl::Time kEnded = absl::UnixEpoch() + absl::Seconds(1012);

CallRecord Prefilled() {
  CallRecord record;
  record.trace.span = {NewTraceId(), NewSpanId(), true};
  record.trace.parent_id = NewSpanId();
  record.came_at = At(1);
  record.request_id = "r";
  record.accepted = true;
  record.num_tokens = 1000;
  record.accepted_at = At(2);
  record.ended_at = At(12);
  record.sent.chunks = 3;
  record.sent.kv_bytes = 99;
  record.sent.first_chunk_at = At(5);
  record.sent.last_chunk_at = At(11);
  PrefillResult result;
  result.accepted_at = At(2);
  result.started_at = At(3);
  result.computed_at = At(10);
  result.pieces = {{0, 128, true, At(3), At(3.5)},
                   {128, 512, false, At(3.5), At(5)},
                   {640, 360, false, At(8), At(10)}};
  record.sent.result = std::make_shared<PrefillResult>(std::move(result));
  return record;
}

std::vector<std::string> Names(const std::vector<TraceSpan>& spans) {
  std::vector<std::string> names;
  for (const TraceSpan& span : spans) names.push_back(span.name());
  return names;
}

std::string Attribute(const TraceSpan& span, const std::string& key) {
  for (const auto& attribute : span.attributes()) {
    if (attribute.key() == key) return attribute.value().ShortDebugString();
  }
  return "";
}

TEST(CallSpansTest, APromptFallsIntoItsParts) {
  const CallRecord record = Prefilled();
  const std::vector<TraceSpan> spans = SpansOf(record, absl::OkStatus(), kEnded);
  ASSERT_THAT(Names(spans),
              ElementsAre("Prefill", "queue", "piece", "piece", "gave way", "piece", "copy out"));
  const TraceSpan& call = spans[0];
  EXPECT_EQ(call.kind(), TraceSpan::SPAN_KIND_SERVER);
  EXPECT_EQ(call.trace_id(), record.trace.span.trace_id);
  EXPECT_EQ(call.span_id(), record.trace.span.span_id);
  EXPECT_EQ(call.parent_span_id(), record.trace.parent_id);
  EXPECT_EQ(call.start_time_unix_nano(), 1'001'000'000'000u);
  EXPECT_EQ(call.end_time_unix_nano(), 1'012'000'000'000u);
  EXPECT_EQ(call.events(0).name(), "accepted");
  EXPECT_EQ(call.events(0).time_unix_nano(), 1'002'000'000'000u);
  EXPECT_EQ(call.events(1).name(), "computed");
  EXPECT_EQ(Attribute(call, "headstart.prompt_tokens"), "int_value: 1000");
  EXPECT_EQ(Attribute(call, "headstart.kv_bytes"), "int_value: 99");
  EXPECT_EQ(Attribute(call, "rpc.grpc.status_code"), "int_value: 0");
  EXPECT_FALSE(call.has_status());
  for (size_t i = 1; i < spans.size(); ++i) {
    EXPECT_EQ(spans[i].trace_id(), call.trace_id());
    EXPECT_EQ(spans[i].parent_span_id(), call.span_id());
    EXPECT_EQ(spans[i].span_id().size(), 8u);
    EXPECT_LE(spans[i].start_time_unix_nano(), spans[i].end_time_unix_nano());
  }
  EXPECT_EQ(Attribute(spans[2], "headstart.source"), "string_value: \"cache\"");
  EXPECT_EQ(Attribute(spans[3], "headstart.first_position"), "int_value: 128");
  EXPECT_EQ(Attribute(spans[3], "headstart.tokens"), "int_value: 512");
  EXPECT_EQ(Attribute(spans[3], "headstart.source"), "string_value: \"computed\"");
  EXPECT_EQ(spans[4].start_time_unix_nano(), 1'005'000'000'000u);
  EXPECT_EQ(spans[4].end_time_unix_nano(), 1'008'000'000'000u);
  EXPECT_EQ(spans[6].start_time_unix_nano(), 1'005'000'000'000u);
}

TEST(CallSpansTest, ErrorsBringTheirReasonButNoMessage) {
  CallRecord record = Prefilled();
  record.sent = {};
  const std::vector<TraceSpan> spans =
      SpansOf(record,
              MakeError(absl::StatusCode::kDeadlineExceeded, ErrorReason::kDeadlineExceeded,
                        "token_ids[3]=77 secret"),
              kEnded);
  EXPECT_THAT(Names(spans), ElementsAre("Prefill", "queue"));  // in which it ended
  EXPECT_EQ(spans[1].end_time_unix_nano(), 1'012'000'000'000u);
  EXPECT_EQ(spans[0].status().code(), opentelemetry::proto::trace::v1::Status::STATUS_CODE_ERROR);
  EXPECT_EQ(Attribute(spans[0], "headstart.reason"), "string_value: \"DEADLINE_EXCEEDED\"");
  EXPECT_EQ(Attribute(spans[0], "rpc.grpc.status_code"), "int_value: 4");
  for (const TraceSpan& span : spans) EXPECT_THAT(span.DebugString(), Not(HasSubstr("secret")));
}

TEST(CallSpansTest, ARefusedCallIsOneSpan) {
  CallRecord record;
  record.trace.span = {NewTraceId(), NewSpanId(), true};
  record.came_at = At(1);
  record.ended_at = At(1.5);
  EXPECT_THAT(Names(SpansOf(record, absl::InvalidArgumentError("no"), kEnded)),
              ElementsAre("Prefill"));
}

TEST(CallSpansTest, PiecesHaveALimit) {
  CallRecord record = Prefilled();
  PrefillResult result = *record.sent.result;
  result.pieces.assign(10'000, {0, 128, false, At(3), At(3)});
  record.sent.result = std::make_shared<PrefillResult>(result);
  const std::vector<TraceSpan> spans = SpansOf(record, absl::OkStatus(), kEnded);
  EXPECT_EQ(spans.size(), 3 + kMaxPieceSpans);
  EXPECT_EQ(Attribute(spans[0], "headstart.pieces"), "int_value: 10000");
}

TEST(CallSpansTest, AFetchSaysWhichPartItWas) {
  FetchRecord record;
  record.trace.span = {NewTraceId(), NewSpanId(), true};
  record.trace.link = TraceContext{NewTraceId(), NewSpanId(), true};
  record.came_at = At(1);
  record.opened = true;
  record.opened_at = At(2);
  record.ended_at = At(5);
  record.part.stripe_index = 1;
  record.part.stripe_count = 4;
  record.from_chunk = 7;
  record.sent.chunks = 1;
  record.sent.kv_bytes = 9;
  record.sent.first_chunk_at = record.sent.last_chunk_at = At(3);
  const std::vector<TraceSpan> spans = SpansOf(record, absl::OkStatus(), kEnded);
  ASSERT_THAT(Names(spans), ElementsAre("FetchKv", "copy out"));
  EXPECT_EQ(spans[0].links(0).trace_id(), record.trace.link->trace_id);
  EXPECT_EQ(spans[0].links(0).span_id(), record.trace.link->span_id);
  EXPECT_EQ(Attribute(spans[0], "headstart.stripe"), "int_value: 1");
  EXPECT_EQ(Attribute(spans[0], "headstart.stripes"), "int_value: 4");
  EXPECT_EQ(Attribute(spans[0], "headstart.from_chunk"), "int_value: 7");
}

}  // namespace
}  // namespace headstart
