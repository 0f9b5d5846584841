#include "server/ops/logging.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <string>

namespace headstart {
namespace {

const char kHostile[] = "a\nlevel=error \"quoted\" \x1b[31m \xff\xfe";

TEST(LoggingTest, JsonFieldsSurviveARoundTrip) {
  const std::string line = FormatLogLine(
      LogFormat::kJson, "event text",
      {{"number", int64_t{-7}}, {"share", 0.25}, {"flag", true}, {"text", "a\"b\nc"}});
  const auto parsed = nlohmann::json::parse("{" + line + "}");
  EXPECT_EQ(parsed["event"], "event text");
  EXPECT_EQ(parsed["number"], -7);
  EXPECT_EQ(parsed["share"], 0.25);
  EXPECT_EQ(parsed["flag"], true);
  EXPECT_EQ(parsed["text"], "a\"b\nc");
}

class LogInjectionTest : public ::testing::TestWithParam<LogFormat> {};

TEST_P(LogInjectionTest, HostileTextStaysOnOneLineOfPlainAscii) {
  const std::string line = FormatLogLine(GetParam(), "event", {{"text", kHostile}});
  for (const char c : line) {
    EXPECT_GE(c, ' ');
    EXPECT_LT(static_cast<unsigned char>(c), 127);
  }
  EXPECT_EQ(line.find("level=error \"quoted"), std::string::npos);  // the quotes are escaped
}

INSTANTIATE_TEST_SUITE_P(Formats, LogInjectionTest,
                         ::testing::Values(LogFormat::kText, LogFormat::kJson));

TEST(LoggingTest, TextIsNameAndValue) {
  EXPECT_EQ(FormatLogLine(LogFormat::kText, "model loaded", {{"name", "x y"}, {"layers", 3}}),
            "model loaded name=\"x y\" layers=3");
}

}  // namespace
}  // namespace headstart
