#include "server/ops/logging.h"

#include <google/protobuf/stubs/logging.h>
#include <grpc/support/log.h>
#include <spdlog/sinks/stdout_sinks.h>
#include <spdlog/spdlog.h>

#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"

namespace headstart {
namespace {

constexpr char kLoggerName[] = "headstart";
constexpr char kTextPattern[] = "%Y-%m-%dT%H:%M:%S.%e%z %^%l%$ %v";
constexpr char kJsonPattern[] = R"({"time":"%Y-%m-%dT%H:%M:%S.%e%z","level":"%l",%v})";

LogFormat log_format = LogFormat::kText;

// Escapes control characters, quotes and everything that is not ASCII; bad UTF-8 is replaced.
std::string Quoted(absl::string_view text) {
  return nlohmann::json(std::string(text))
      .dump(-1, ' ', /*ensure_ascii=*/true, nlohmann::json::error_handler_t::replace);
}

std::string ValueText(const LogField::Value& value) {
  if (const auto* text = std::get_if<std::string>(&value)) return Quoted(*text);
  if (const auto* number = std::get_if<double>(&value)) return nlohmann::json(*number).dump();
  if (const auto* flag = std::get_if<bool>(&value)) return *flag ? "true" : "false";
  return absl::StrCat(std::get<int64_t>(value));
}

spdlog::level::level_enum ToSpdlog(LogLevel level) {
  switch (level) {
    case LogLevel::kDebug:
      return spdlog::level::debug;
    case LogLevel::kInfo:
      return spdlog::level::info;
    case LogLevel::kWarn:
      return spdlog::level::warn;
    case LogLevel::kError:
      return spdlog::level::err;
  }
  return spdlog::level::err;
}

void LogFromGrpc(gpr_log_func_args* args) {
  const LogLevel level =
      args->severity == GPR_LOG_SEVERITY_ERROR ? LogLevel::kWarn : LogLevel::kDebug;
  Log(level, "grpc", {{"message", args->message}, {"file", args->file}, {"line", args->line}});
}

// Protobuf complains about what clients send; they are told by their status.
void LogFromProtobuf(google::protobuf::LogLevel, const char* file, int line,
                     const std::string& message) {
  Log(LogLevel::kDebug, "protobuf", {{"message", message}, {"file", file}, {"line", line}});
}

}  // namespace

void InitLogging(LogFormat format, const std::string& level) {
  log_format = format;
  auto logger = std::make_shared<spdlog::logger>(kLoggerName,
                                                 std::make_shared<spdlog::sinks::stderr_sink_mt>());
  logger->set_pattern(format == LogFormat::kJson ? kJsonPattern : kTextPattern);
  logger->set_level(spdlog::level::from_str(level));
  logger->flush_on(spdlog::level::debug);
  spdlog::set_default_logger(std::move(logger));
  gpr_set_log_function(LogFromGrpc);
  google::protobuf::SetLogHandler(LogFromProtobuf);
}

void Log(LogLevel level, absl::string_view event, std::initializer_list<LogField> fields) {
  spdlog::logger* logger = spdlog::default_logger_raw();
  if (!logger->should_log(ToSpdlog(level))) return;
  logger->log(ToSpdlog(level), "{}", FormatLogLine(log_format, event, fields));
}

std::string FormatLogLine(LogFormat format, absl::string_view event,
                          std::initializer_list<LogField> fields) {
  const bool json = format == LogFormat::kJson;
  std::string line = json ? absl::StrCat("\"event\":", Quoted(event)) : std::string(event);
  for (const LogField& field : fields) {
    if (json) {
      absl::StrAppend(&line, ",\"", field.name, "\":", ValueText(field.value));
    } else {
      absl::StrAppend(&line, " ", field.name, "=", ValueText(field.value));
    }
  }
  return line;
}

}  // namespace headstart
