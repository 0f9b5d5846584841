// The server's log: one line per event on standard error, as text or JSON, with named fields. Never
// prompt tokens.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>
#include <utility>
#include <variant>

#include "absl/strings/string_view.h"
#include "server/options.h"

namespace headstart {

enum class LogLevel : uint8_t { kDebug, kInfo, kWarn, kError };

struct LogField {
  using Value = std::variant<int64_t, double, bool, std::string>;

  LogField(absl::string_view name, const std::string& v) : name(name), value(v) {}
  LogField(absl::string_view name, absl::string_view v) : name(name), value(std::string(v)) {}
  LogField(absl::string_view name, const char* v) : name(name), value(std::string(v)) {}
  LogField(absl::string_view name, double v) : name(name), value(v) {}
  LogField(absl::string_view name, bool v) : name(name), value(v) {}
  LogField(absl::string_view name, int64_t v) : name(name), value(v) {}
  LogField(absl::string_view name, int v) : name(name), value(int64_t{v}) {}

  absl::string_view name;
  Value value;
};

// Before the first thread starts. `level` is debug, info, warn or error. gRPC's own messages go to
// the same log.
void InitLogging(LogFormat format, const std::string& level);

// `event` is a short fixed text. Values may be anything: they are escaped.
void Log(LogLevel level, absl::string_view event, std::initializer_list<LogField> fields = {});

// The line that Log writes after time and level; for tests.
std::string FormatLogLine(LogFormat format, absl::string_view event,
                          std::initializer_list<LogField> fields);

}  // namespace headstart
