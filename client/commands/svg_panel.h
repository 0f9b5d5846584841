// A panel of a picture: two axes with ticks, and dots and lines in their units. Writes SVG.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace headstart {

struct SvgAxis {
  std::string label = "";
  double least = 0;
  double most = 1;   // more than `least`
  bool log = false;  // then `least` is more than 0
};

// Where an axis has its ticks, some five of them: multiples of 1, 2 or 5 times a power of ten; of a
// logarithmic axis the powers themselves, and 2 and 5 times those where they are few.
std::vector<double> TicksOf(const SvgAxis& axis);

class SvgPanel {
 public:
  // The panel lies `top` pixels below the picture's top and is as high as kHeight.
  SvgPanel(std::string title, SvgAxis x, SvgAxis y, int top);

  static constexpr int kWidth = 960;
  static constexpr int kHeight = 300;

  using Point = std::pair<double, double>;
  void Dots(const std::vector<Point>& points, const std::string& color);
  void Line(const std::vector<Point>& points, const std::string& color);
  void Legend(const std::vector<std::pair<std::string, std::string>>& names_and_colors);

  // An element `g`.
  std::string Finish() &&;

 private:
  double X(double value) const;
  double Y(double value) const;
  void DrawAxes();

  const SvgAxis x_, y_;
  const int top_;
  std::string text_;
};

// The picture of panels that lie one below the other. `title` may hold anything.
std::string SvgPicture(const std::string& title, const std::vector<std::string>& panels);

}  // namespace headstart
