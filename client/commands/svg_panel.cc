#include "client/commands/svg_panel.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"

namespace headstart {
namespace {

// The frame inside a panel, in pixels.
constexpr double kLeft = 70, kRight = SvgPanel::kWidth - 20;
constexpr double kTop = 30, kBottom = SvgPanel::kHeight - 45;

std::string Escape(const std::string& text) {
  return absl::StrReplaceAll(text,
                             {{"&", "&amp;"}, {"<", "&lt;"}, {">", "&gt;"}, {"\"", "&quot;"}});
}

// Position of a value on its axis, 0 to 1.
double Place(const SvgAxis& axis, double value) {
  const double place = axis.log ? std::log(std::max(value, axis.least) / axis.least) /
                                      std::log(axis.most / axis.least)
                                : (value - axis.least) / (axis.most - axis.least);
  return std::clamp(place, 0.0, 1.0);
}

std::vector<double> LinearTicks(const SvgAxis& axis) {
  const double raw = (axis.most - axis.least) / 5;
  const double power = std::pow(10, std::floor(std::log10(raw)));
  const double step = power * (raw / power > 5   ? 10
                               : raw / power > 2 ? 5
                               : raw / power > 1 ? 2
                                                 : 1);
  std::vector<double> ticks;
  for (double i = std::ceil(axis.least / step); i * step <= axis.most * (1 + 1e-12); ++i)
    ticks.push_back(i * step);
  return ticks;
}

std::vector<double> LogTicks(const SvgAxis& axis) {
  const bool few = axis.most / axis.least < 1000;
  std::vector<double> ticks;
  const double first = std::floor(std::log10(axis.least));
  for (double power = first; std::pow(10, power) <= axis.most; ++power) {
    for (const double times : {1.0, 2.0, 5.0}) {
      const double value = times * std::pow(10, power);
      const bool inside = value >= axis.least * (1 - 1e-12) && value <= axis.most * (1 + 1e-12);
      if (inside && (few || times == 1.0)) ticks.push_back(value);
    }
  }
  return ticks;
}

}  // namespace

std::vector<double> TicksOf(const SvgAxis& axis) {
  return axis.log ? LogTicks(axis) : LinearTicks(axis);
}

SvgPanel::SvgPanel(std::string title, SvgAxis x, SvgAxis y, int top)
    : x_(std::move(x)), y_(std::move(y)), top_(top) {
  absl::StrAppendFormat(
      &text_,
      "<g transform=\"translate(0,%d)\">\n<text x=\"%g\" y=\"18\" class=\"title\">%s</text>\n",
      top_, kLeft, Escape(title));
  DrawAxes();
}

double SvgPanel::X(double value) const { return kLeft + Place(x_, value) * (kRight - kLeft); }
double SvgPanel::Y(double value) const { return kBottom - Place(y_, value) * (kBottom - kTop); }

void SvgPanel::DrawAxes() {
  for (const double tick : TicksOf(x_)) {
    absl::StrAppendFormat(&text_,
                          "<path d=\"M%.1f %g V%g\" class=\"grid\"/><text x=\"%.1f\" y=\"%g\" "
                          "text-anchor=\"middle\">%g</text>\n",
                          X(tick), kTop, kBottom, X(tick), kBottom + 15, tick);
  }
  for (const double tick : TicksOf(y_)) {
    absl::StrAppendFormat(&text_,
                          "<path d=\"M%g %.1f H%g\" class=\"grid\"/><text x=\"%g\" y=\"%.1f\" "
                          "text-anchor=\"end\">%g</text>\n",
                          kLeft, Y(tick), kRight, kLeft - 6, Y(tick) + 4, tick);
  }
  absl::StrAppendFormat(
      &text_,
      "<path d=\"M%g %g V%g H%g\" class=\"axis\"/><text x=\"%g\" y=\"%g\" "
      "text-anchor=\"end\">%s</text><text transform=\"translate(14,%g) rotate(-90)\" "
      "text-anchor=\"middle\">%s</text>\n",
      kLeft, kTop, kBottom, kRight, kRight, kBottom + 32, Escape(x_.label), (kTop + kBottom) / 2,
      Escape(y_.label));
}

void SvgPanel::Dots(const std::vector<Point>& points, const std::string& color) {
  absl::StrAppend(&text_, "<g fill=\"", color, "\" fill-opacity=\"0.6\">");
  for (const auto& [x, y] : points)
    absl::StrAppendFormat(&text_, "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"2.5\"/>", X(x), Y(y));
  text_ += "</g>\n";
}

void SvgPanel::Line(const std::vector<Point>& points, const std::string& color) {
  if (points.empty()) return;
  const std::string path =
      absl::StrJoin(points, " L", [this](std::string* out, const Point& point) {
        absl::StrAppendFormat(out, "%.1f %.1f", X(point.first), Y(point.second));
      });
  absl::StrAppend(&text_, "<path d=\"M", path, "\" fill=\"none\" stroke-width=\"1.5\" stroke=\"",
                  color, "\"/>\n");
}

void SvgPanel::Legend(const std::vector<std::pair<std::string, std::string>>& names_and_colors) {
  double x = kRight;
  for (auto it = names_and_colors.rbegin(); it != names_and_colors.rend(); ++it) {
    absl::StrAppendFormat(&text_,
                          "<text x=\"%g\" y=\"18\" text-anchor=\"end\" fill=\"%s\">%s</text>\n", x,
                          it->second, Escape(it->first));
    x -= 7.0 * static_cast<double>(it->first.size()) + 20;
  }
}

std::string SvgPanel::Finish() && { return std::move(text_) + "</g>\n"; }

std::string SvgPicture(const std::string& title, const std::vector<std::string>& panels) {
  const int height = static_cast<int>(panels.size()) * SvgPanel::kHeight;
  return absl::StrCat(
      absl::StrFormat(
          "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %d %d\" width=\"%d\" "
          "height=\"%d\">\n<title>%s</title>\n",
          SvgPanel::kWidth, height, SvgPanel::kWidth, height, Escape(title)),
      "<style>text{font:12px sans-serif} .title{font-size:14px;font-weight:bold} "
      ".grid{stroke:#e4e4e4} .axis{stroke:#555;fill:none}</style>\n",
      "<rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n", absl::StrJoin(panels, ""),
      "</svg>\n");
}

}  // namespace headstart
