#include "server/ops/trace_context.h"

#include <gtest/gtest.h>

#include <set>
#include <string>
#include <vector>

#include "absl/strings/escaping.h"
#include "server/ops/otlp_sink.h"

namespace headstart {
namespace {

TEST(TraceParentTest, FindsTraceParentAndFlag) {
  const auto sampled = ParseTraceParent("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01");
  ASSERT_TRUE(sampled.has_value());
  EXPECT_EQ(absl::BytesToHexString(sampled->trace_id), "4bf92f3577b34da6a3ce929d0e0e4736");
  EXPECT_EQ(absl::BytesToHexString(sampled->span_id), "00f067aa0ba902b7");
  EXPECT_TRUE(sampled->sampled);
  for (const char* flags : {"00", "02", "fe"}) {
    const auto other = ParseTraceParent("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-" +
                                        std::string(flags));
    ASSERT_TRUE(other.has_value()) << flags;
    EXPECT_FALSE(other->sampled) << flags;
  }
  EXPECT_TRUE(ParseTraceParent("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-ff")->sampled);
}

TEST(TraceParentTest, IgnoresWhatIsNotValid) {
  for (const std::string& text : std::vector<std::string>{
           "", "-", "00-", "4bf92f3577b34da6a3ce929d0e0e4736",
           "01-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",    // another version
           "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",    // none at all
           "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",    // upper case
           "00-00000000000000000000000000000000-00f067aa0ba902b7-01",    // no trace
           "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",    // no parent
           "00-4bf92f3577b34da6a3ce929d0e0e473x-00f067aa0ba902b7-01",    // no digit
           "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-0x",    // no flags
           "00-4bf92f3577b34da6a3ce929d0e0e4736_00f067aa0ba902b7-01",    // no dash
           "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7_01",    // nor here
           "00_4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",    // nor here
           "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-0",     // too short
           "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-x",  // too long
           std::string(55, '\0'), std::string(55, '\xff'), std::string(1 << 20, '-')}) {
    EXPECT_FALSE(ParseTraceParent(text).has_value()) << text.substr(0, 80);
  }
}

TEST(TraceIdTest, IdsDifferAndAreNeverZero) {
  std::set<std::string> seen;
  for (int i = 0; i < 1000; ++i) {
    for (const std::string& id : {NewTraceId(), NewSpanId()}) {
      EXPECT_NE(id.find_first_not_of('\0'), std::string::npos);
      EXPECT_TRUE(seen.insert(id).second);
    }
  }
  EXPECT_EQ(NewTraceId().size(), 16u);
  EXPECT_EQ(NewSpanId().size(), 8u);
}

TEST(OtlpEndpointTest, SchemeDecidesAboutTls) {
  EXPECT_EQ(*ParseOtlpEndpoint("a:4317"), (OtlpEndpoint{"a:4317", false}));
  EXPECT_EQ(*ParseOtlpEndpoint("http://a:4317"), (OtlpEndpoint{"a:4317", false}));
  EXPECT_EQ(*ParseOtlpEndpoint("https://[::1]:4317"), (OtlpEndpoint{"[::1]:4317", true}));
  for (const char* text : {"", "a", "a:0", ":4317", "https://a", "a:4317/v1/traces", "ftp://a:1"}) {
    EXPECT_FALSE(ParseOtlpEndpoint(text).ok()) << text;
  }
}

}  // namespace
}  // namespace headstart
