#include "client/commands/load_plot.h"

#include <algorithm>
#include <fstream>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "client/commands/svg_panel.h"
#include "kernels/base/instant.h"

namespace headstart {
namespace {

constexpr const char* kColors[] = {"#1b6ca8", "#2e8b57", "#d98200", "#7b3fa0"};  // by class
constexpr const char* kRefusedColor = "#c0392b";

using Points = std::vector<SvgPanel::Point>;
using Legend = std::vector<std::pair<std::string, std::string>>;

class LoadPlot {
 public:
  explicit LoadPlot(const BenchCell& cell) : cell_(cell), classes_(LengthClasses().size()) {
    for (const LoadSample& sample : cell.result.samples) {
      if (sample.ok()) {
        classes_[ClassOf(sample.prompt_tokens)].push_back(
            {Seconds(sample.planned), 1e3 * absl::ToDoubleSeconds(sample.ttft())});
      } else {
        bad_.push_back(&sample);
      }
    }
    ttft_axis_ = {.label = "TTFT, ms", .least = 1e-3, .most = 1, .log = true};
    const Percentiles& ttft = cell.summary.all.ttft;
    if (ttft.count == 0) return;
    double least = 1e3 * ttft.max;
    for (const Points& points : classes_)
      for (const auto& [x, y] : points) least = std::min(least, y);
    ttft_axis_.least = std::max(least / 1.2, 1e-3);
    ttft_axis_.most = std::max(1e3 * ttft.max * 1.2, 2 * ttft_axis_.least);
  }

  std::string OverTime(int top) const {
    SvgPanel panel("TTFT over the time when a prompt was planned", TimeAxis(), ttft_axis_, top);
    for (size_t i = 0; i < classes_.size(); ++i) panel.Dots(classes_[i], kColors[i]);
    Points refused;
    for (const LoadSample* sample : bad_)
      refused.push_back({Seconds(sample->planned), ttft_axis_.least});
    panel.Dots(refused, kRefusedColor);
    Legend legend = ClassNames();
    if (!bad_.empty()) legend.push_back({"refused or failed", kRefusedColor});
    panel.Legend(legend);
    return std::move(panel).Finish();
  }

  std::string Distribution(int top) const {
    SvgPanel panel("Share of prompts with at most this TTFT", ttft_axis_,
                   {.label = "share", .least = 0, .most = 1}, top);
    for (size_t i = 0; i < classes_.size(); ++i) {
      std::vector<double> values;
      for (const auto& [x, y] : classes_[i]) values.push_back(y);
      std::sort(values.begin(), values.end());
      Points steps;
      for (size_t n = 0; n < values.size(); ++n) {
        steps.push_back({values[n], Part(n, values.size())});
        steps.push_back({values[n], Part(n + 1, values.size())});
      }
      panel.Line(steps, kColors[i]);
    }
    panel.Legend(ClassNames());
    return std::move(panel).Finish();
  }

  std::string UnderWay(int top) const {
    Points under_way, waiting;
    for (const LoadSample& sample : cell_.result.samples) {
      Change(sample.sent, sample.ended, &under_way);
      const bool began = sample.began != Instant::InfinitePast();
      Change(sample.planned, began ? sample.began : sample.ended, &waiting);
    }
    double most = 1;
    for (Points* steps : {&under_way, &waiting}) most = std::max(most, AddUp(steps));
    SvgPanel panel("Requests", TimeAxis(), {.label = "requests", .least = 0, .most = 1.1 * most},
                   top);
    panel.Line(under_way, kColors[0]);
    panel.Line(waiting, kRefusedColor);
    panel.Legend(
        {{"sent, not ended", kColors[0]}, {"planned, computing has not begun", kRefusedColor}});
    return std::move(panel).Finish();
  }

 private:
  double Seconds(Instant time) const { return absl::ToDoubleSeconds(time - cell_.result.start); }
  static double Part(size_t n, size_t whole) {
    return static_cast<double>(n) / static_cast<double>(whole);
  }
  SvgAxis TimeAxis() const {
    const double wall = absl::ToDoubleSeconds(cell_.result.wall);
    return {.label = "seconds", .least = 0, .most = std::max(wall, 1e-3)};
  }
  Legend ClassNames() const {
    Legend names;
    for (size_t i = 0; i < classes_.size(); ++i)
      if (!classes_[i].empty())
        names.push_back({absl::StrCat(LengthClasses()[i].name, " tokens"), kColors[i]});
    return names;
  }
  // One more from `begin` on, one less from `end` on.
  void Change(Instant begin, Instant end, Points* changes) const {
    changes->push_back({Seconds(begin), 1});
    changes->push_back({Seconds(end), -1});
  }
  // Turns changes into the steps of a line; its highest.
  static double AddUp(Points* changes) {
    std::sort(changes->begin(), changes->end());
    Points steps;
    double now = 0;
    double most = 0;
    for (const auto& [time, change] : *changes) {
      steps.push_back({time, now});
      steps.push_back({time, now += change});
      most = std::max(most, now);
    }
    *changes = std::move(steps);
    return most;
  }

  const BenchCell& cell_;
  std::vector<Points> classes_;  // planned, TTFT in ms
  std::vector<const LoadSample*> bad_;
  SvgAxis ttft_axis_;
};

}  // namespace

std::string PlotSvg(const BenchCell& cell) {
  const LoadPlot plot(cell);
  return SvgPicture(absl::StrCat("headstart bench: ", cell.preset, ", ", cell.tokens, " tokens"),
                    {plot.OverTime(0), plot.Distribution(SvgPanel::kHeight),
                     plot.UnderWay(2 * SvgPanel::kHeight)});
}

absl::Status WritePlot(const std::string& path, const BenchCell& cell) {
  std::ofstream file(path, std::ios::trunc);
  file << PlotSvg(cell);
  file.close();
  return file ? absl::OkStatus() : absl::InternalError(absl::StrCat("can't write ", path));
}

}  // namespace headstart
