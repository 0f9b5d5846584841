#include "client/commands/load_plot.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

#include "client/commands/svg_panel.h"

namespace headstart {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;

int CountOf(const std::string& text, const std::string& part) {
  int count = 0;
  for (size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) ++count;
  return count;
}

BenchCell CellOf(int64_t num_ok, int64_t num_refused) {
  BenchCell cell;
  cell.preset = "<b>&";
  cell.tokens = "mix";
  cell.result.start = Instant() + absl::Seconds(5);
  cell.result.wall = absl::Seconds(10);
  for (int64_t i = 0; i < num_ok + num_refused; ++i) {
    LoadSample& sample = cell.result.samples.emplace_back();
    sample.planned = sample.sent = cell.result.start + absl::Seconds(i);
    sample.ended = sample.planned + absl::Milliseconds(500 + i);
    sample.prompt_tokens = 1000 * (i + 1);
    if (i >= num_ok) {
      sample.error = "UNAVAILABLE";
      continue;
    }
    sample.accepted = sample.began = sample.planned + absl::Milliseconds(1);
    sample.first_token = sample.all_kv = sample.ended;
  }
  cell.summary = Summarize(cell.result);
  return cell;
}

TEST(LoadPlotTest, ShowsEveryPromptAsADot) {
  const std::string svg = PlotSvg(CellOf(5, 2));
  EXPECT_EQ(CountOf(svg, "<circle"), 7);
  EXPECT_EQ(CountOf(svg, "class=\"title\""), 3);
  for (const char* part : {"&lt;= 2K tokens", "&lt;= 8K tokens", "refused or failed", "TTFT, ms"})
    EXPECT_THAT(svg, HasSubstr(part));
  EXPECT_EQ(CountOf(svg, "<g"), CountOf(svg, "</g>"));
  EXPECT_THAT(svg, Not(HasSubstr("<b>")));
  EXPECT_THAT(svg, Not(HasSubstr("nan")));
  EXPECT_THAT(svg, Not(HasSubstr("inf")));
  EXPECT_EQ(CountOf(svg, "http"), 1) << "nothing from elsewhere but the name of SVG";
}

TEST(LoadPlotTest, ALoadInWhichNothingWentWellHasAPicture) {
  const std::string svg = PlotSvg(CellOf(0, 3));
  EXPECT_EQ(CountOf(svg, "<circle"), 3);
  EXPECT_THAT(svg, Not(HasSubstr("nan")));
  EXPECT_THAT(svg, Not(HasSubstr("inf")));
}

TEST(SvgPanelTest, TicksAreRoundNumbers) {
  EXPECT_THAT(TicksOf({.least = 0, .most = 10}), ElementsAre(0, 2, 4, 6, 8, 10));
  EXPECT_THAT(TicksOf({.least = 0, .most = 110}), ElementsAre(0, 50, 100));
  EXPECT_THAT(TicksOf({.least = 3, .most = 70, .log = true}), ElementsAre(5, 10, 20, 50));
  EXPECT_THAT(TicksOf({.least = 0.5, .most = 5000, .log = true}), ElementsAre(1, 10, 100, 1000));
}

TEST(SvgPanelTest, PlacesPointsInItsFrame) {
  SvgPanel panel("title", {.least = 0, .most = 2}, {.least = 1, .most = 100, .log = true}, 0);
  panel.Dots({{0, 1}, {2, 100}, {1, 10}, {9, 1e9}}, "red");
  const std::string text = std::move(panel).Finish();
  EXPECT_THAT(text, HasSubstr("cx=\"70.0\" cy=\"255.0\""));
  EXPECT_THAT(text, HasSubstr("cx=\"940.0\" cy=\"30.0\""));
  EXPECT_THAT(text, HasSubstr("cx=\"505.0\" cy=\"142.5\""));
  EXPECT_EQ(CountOf(text, "cx=\"940.0\" cy=\"30.0\""), 2) << "what lies outside, on the border";
}

}  // namespace
}  // namespace headstart
