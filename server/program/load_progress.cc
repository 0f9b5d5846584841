#include "server/program/load_progress.h"

#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>

#include "absl/strings/str_format.h"
#include "server/ops/logging.h"

namespace headstart {
namespace {

constexpr int kBarCells = 40;
constexpr int kLogStepPercent = 10;

bool WantsBar(LogFormat format) {
  return format == LogFormat::kText && isatty(STDERR_FILENO) != 0 &&
         std::getenv("NO_COLOR") == nullptr;
}

int Percent(int64_t done, int64_t total) {
  return total > 0 ? static_cast<int>(100 * done / total) : 100;
}

void DrawBar(int percent, int64_t total_bytes) {
  const int filled = percent * kBarCells / 100;
  absl::FPrintF(stderr, "\rloading [%s%s] %3d%% of %.1f MiB%s", std::string(filled, '#'),
                std::string(kBarCells - filled, ' '), percent,
                static_cast<double>(total_bytes) / (1 << 20), percent == 100 ? "\n" : "");
  std::fflush(stderr);
}

}  // namespace

LoadProgress MakeLoadProgress(LogFormat format) {
  const bool bar = WantsBar(format);
  auto shown = std::make_shared<int>(-1);  // percent; the loading thread's alone
  return [bar, shown](int64_t done_bytes, int64_t total_bytes) {
    const int percent = Percent(done_bytes, total_bytes);
    const int step = bar ? 1 : kLogStepPercent;
    if (percent / step == *shown) return absl::OkStatus();
    *shown = percent / step;
    if (bar) {
      DrawBar(percent, total_bytes);
    } else {
      Log(LogLevel::kInfo, "loading", {{"percent", percent}, {"total_bytes", total_bytes}});
    }
    return absl::OkStatus();
  };
}

}  // namespace headstart
