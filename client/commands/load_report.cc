#include "client/commands/load_report.h"

#include <fstream>
#include <utility>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "kernels/base/instant.h"

namespace headstart {
namespace {

// 12.3ms or 1.234s, in 8 columns.
std::string Time(double seconds) {
  return seconds < 1 ? absl::StrFormat("%6.1fms", seconds * 1e3)
                     : absl::StrFormat("%7.3fs", seconds);
}

std::string TimeColumns(const Percentiles& p) {
  if (p.count == 0) return absl::StrFormat(" %8s %8s %8s %8s %8s", "-", "-", "-", "-", "-");
  return absl::StrCat(" ", Time(p.p50), " ", Time(p.p90), " ", Time(p.p95), " ", Time(p.p99), " ",
                      Time(p.max));
}

double Share(int64_t part, int64_t whole) {
  return whole == 0 ? 0.0 : static_cast<double>(part) / static_cast<double>(whole);
}

std::string FormatClass(const BenchCell& cell, const char* name, const ClassSummary& of) {
  std::string line = absl::StrCat(absl::StrFormat("%-8s %8d %8d", name, of.prompts, of.ok),
                                  TimeColumns(of.ttft), " ", TimeColumns(of.all_kv));
  if (cell.slo_ttft != absl::InfiniteDuration())
    absl::StrAppendFormat(&line, " %6.1f %%", 100 * Share(of.within_slo, of.prompts));
  return line + "\n";
}

std::string FormatClasses(const BenchCell& cell) {
  std::string text = absl::StrFormat("%-8s %8s %8s %8s %8s %8s %8s %8s  %8s %8s %8s %8s %8s",
                                     "tokens", "prompts", "ok", "TTFT p50", "p90", "p95", "p99",
                                     "max", "KV p50", "p90", "p95", "p99", "max");
  if (cell.slo_ttft != absl::InfiniteDuration())
    absl::StrAppend(&text, "   <= ", absl::FormatDuration(cell.slo_ttft));
  text += "\n";
  for (size_t i = 0; i < LengthClasses().size(); ++i) {
    const ClassSummary& of = cell.summary.classes[i];
    if (of.prompts > 0) text += FormatClass(cell, LengthClasses()[i].name, of);
  }
  return text + FormatClass(cell, "all", cell.summary.all);
}

std::string FormatErrors(const LoadSummary& s) {
  std::string text;
  for (const auto& [kind, errors] : s.errors) {
    absl::StrAppendFormat(&text, "  %d x %s, as: %s\n", errors.count, absl::Utf8SafeCEscape(kind),
                          errors.example);
  }
  return text;
}

std::string FormatRefusals(const LoadSummary& s) {
  std::string text;
  for (const auto& [kind, errors] : s.errors) {
    absl::StrAppend(&text, errors.refused > 0 ? "refused " : "failed  ",
                    absl::Utf8SafeCEscape(kind), ": ", errors.count, ", after p50 ",
                    Time(errors.time.p50), " p99 ", Time(errors.time.p99), " max ",
                    Time(errors.time.max), ", as: ", errors.example, "\n");
  }
  return text;
}

std::string FormatPrediction(const Percentiles& error) {
  if (error.count == 0) return "predicted TTFT: the server said none\n";
  return absl::StrFormat("predicted TTFT: %d times, off by p50 %.1f %%, p95 %.1f %% of what came\n",
                         error.count, 100 * error.p50, 100 * error.p95);
}

nlohmann::json TimesJson(const Percentiles& p) {
  return {{"p50", p.p50}, {"p90", p.p90}, {"p95", p.p95}, {"p99", p.p99}, {"max", p.max}};
}

nlohmann::json ClassJson(const BenchCell& cell, const char* name, const ClassSummary& of) {
  nlohmann::json json = {{"class", name},
                         {"prompts", of.prompts},
                         {"accepted", of.accepted},
                         {"ok", of.ok},
                         {"ttft_seconds", TimesJson(of.ttft)},
                         {"all_kv_seconds", TimesJson(of.all_kv)}};
  if (cell.slo_ttft != absl::InfiniteDuration()) {
    json["slo_attainment"] = Share(of.within_slo, of.prompts);
    json["slo_attainment_of_accepted"] = Share(of.within_slo, of.accepted);
  }
  return json;
}

nlohmann::json ErrorsJson(const LoadSummary& s) {
  nlohmann::json json = nlohmann::json::object();
  for (const auto& [kind, errors] : s.errors) {
    json[kind] = {{"count", errors.count},
                  {"refused", errors.refused},
                  {"example", errors.example},
                  {"seconds", TimesJson(errors.time)}};
  }
  return json;
}

nlohmann::json PredictionJson(const Percentiles& error) {
  if (error.count == 0) return {{"count", 0}, {"error_p50", nullptr}, {"error_p95", nullptr}};
  return {{"count", error.count}, {"error_p50", error.p50}, {"error_p95", error.p95}};
}

// A number where all prompts have one length.
nlohmann::json TokensJson(const std::string& tokens) {
  int64_t number;
  return absl::SimpleAtoi(tokens, &number) ? nlohmann::json(number) : nlohmann::json(tokens);
}

// A cell of CSV.
std::string CsvField(const nlohmann::ordered_json& value) {
  if (value.is_null()) return "";
  if (!value.is_string()) return value.dump();
  return absl::StrCat("\"", absl::StrReplaceAll(value.get<std::string>(), {{"\"", "\"\""}}), "\"");
}

std::string CsvLine(const nlohmann::ordered_json& record, bool names) {
  std::vector<std::string> fields;
  for (const auto& [name, value] : record.items()) fields.push_back(names ? name : CsvField(value));
  return absl::StrJoin(fields, ",");
}

}  // namespace

std::string FormatCellHeader() {
  return absl::StrFormat("%-10s %8s %9s %10s %9s %9s %9s %8s %8s %8s %9s %5s %5s\n", "preset",
                         "tokens", "requests", "tokens/s", "TTFT p50", "p90", "p99", "density",
                         "KV MB", "KV GB/s", "exposed", "conns", "hit");
}

std::string FormatCellLine(const BenchCell& cell) {
  const LoadSummary& s = cell.summary;
  const Percentiles& ttft = s.all.ttft;
  return absl::StrFormat(
             "%-10s %8s %9s %10.0f %8.3fs %8.3fs %8.3fs %8.3f %8.1f %8.3f %8.3fs %5d %5.2f\n",
             cell.preset, cell.tokens, absl::StrCat(s.all.ok, "/", s.all.prompts),
             s.tokens_per_second, ttft.p50, ttft.p90, ttft.p99, s.density,
             s.kv_bytes_per_prompt / 1e6, s.kv_gigabytes_per_second, s.exposed_transfer_p50,
             s.connections, s.prefix_hit_rate()) +
         FormatErrors(s);
}

std::string FormatCellDetails(const BenchCell& cell) {
  const LoadSummary& s = cell.summary;
  return absl::StrCat(
      absl::StrFormat(
          "%s, %s tokens: %d prompts in %.1f s, %d well, %d refused, %d failed; %d sent "
          "late (the worst %s)\n",
          cell.preset, cell.tokens, s.all.prompts, absl::ToDoubleSeconds(cell.result.wall),
          s.all.ok, s.refused, s.failed, s.late, absl::StripAsciiWhitespace(Time(s.max_lateness))),
      absl::StrFormat("%.0f tokens/s, %.2f requests/s, KV %.3f GB/s (%.1f MB a prompt), "
                      "density %.3f, prefix hit %.1f %%, held by the client %.1f %%\n",
                      s.tokens_per_second, s.requests_per_second, s.kv_gigabytes_per_second,
                      s.kv_bytes_per_prompt / 1e6, s.density, 100 * s.prefix_hit_rate(),
                      100 * Share(s.skipped_tokens, s.prompt_tokens)),
      FormatClasses(cell), FormatRefusals(s), FormatPrediction(s.prediction_error));
}

nlohmann::json CellJson(const BenchCell& cell) {
  const LoadSummary& s = cell.summary;
  nlohmann::json json = ClassJson(cell, "all", s.all);
  std::vector<double> ttft, all_kv;
  for (const LoadSample& sample : cell.result.samples) {
    if (!sample.ok()) continue;
    ttft.push_back(absl::ToDoubleSeconds(sample.ttft()));
    all_kv.push_back(absl::ToDoubleSeconds(sample.time_to_all_kv()));
  }
  json["ttft_seconds"]["all"] = std::move(ttft);
  json["all_kv_seconds"]["all"] = std::move(all_kv);
  json["classes"] = nlohmann::json::array();
  for (size_t i = 0; i < s.classes.size(); ++i)
    json["classes"].push_back(ClassJson(cell, LengthClasses()[i].name, s.classes[i]));
  json.update({{"preset", cell.preset},
               {"prompt_tokens", TokensJson(cell.tokens)},
               {"requests", s.all.prompts},
               {"refused", s.refused},
               {"failed", s.failed},
               {"refusal_seconds", TimesJson(s.refusal_time)},
               {"errors", ErrorsJson(s)},
               {"late", {{"count", s.late}, {"max_seconds", s.max_lateness}}},
               {"start_unix_seconds", absl::ToDoubleSeconds(cell.result.start - Instant())},
               {"wall_seconds", absl::ToDoubleSeconds(cell.result.wall)},
               {"tokens_per_second", s.tokens_per_second},
               {"requests_per_second", s.requests_per_second},
               {"prefix_hit_rate", s.prefix_hit_rate()},
               {"cached_tokens", s.cached_tokens},
               {"skipped_tokens", s.skipped_tokens},
               {"predicted_ttft", PredictionJson(s.prediction_error)},
               {"density", s.density},
               {"exposed_transfer_seconds", {{"p50", s.exposed_transfer_p50}}},
               {"connections", s.connections},
               {"kv_bytes_per_prompt", s.kv_bytes_per_prompt},
               {"kv_gigabytes_per_second", s.kv_gigabytes_per_second}});
  if (cell.slo_ttft != absl::InfiniteDuration())
    json["slo_ttft_seconds"] = absl::ToDoubleSeconds(cell.slo_ttft);
  return json;
}

nlohmann::ordered_json RecordJson(const BenchCell& cell, size_t index) {
  const LoadSample& sample = cell.result.samples[index];
  const auto seconds = [&](Instant time) -> nlohmann::ordered_json {
    if (time == Instant::InfinitePast()) return nullptr;
    return absl::ToDoubleSeconds(time - cell.result.start);
  };
  nlohmann::ordered_json predicted;
  if (sample.predicted_ttft.has_value()) predicted = absl::ToDoubleSeconds(*sample.predicted_ttft);
  return {{"index", index},
          {"preset", cell.preset},
          {"tokens", sample.prompt_tokens},
          {"priority", sample.priority},
          {"planned", seconds(sample.planned)},
          {"sent", seconds(sample.sent)},
          {"accepted", seconds(sample.accepted)},
          {"began", seconds(sample.began)},
          {"first_token", seconds(sample.first_token)},
          {"all_kv", seconds(sample.all_kv)},
          {"ended", seconds(sample.ended)},
          {"predicted_ttft", predicted},
          {"cached_tokens", sample.cached_tokens},
          {"skipped_tokens", sample.skipped_tokens},
          {"kv_bytes", sample.kv_bytes},
          {"outcome", sample.ok()      ? "ok"
                      : sample.refused ? "refused"
                                       : "failed"},
          {"error", sample.error}};
}

absl::Status WriteRecords(const std::string& path, const std::vector<BenchCell>& cells) {
  std::ofstream file(path, std::ios::trunc);
  const bool csv = absl::EndsWith(path, ".csv");
  bool first = true;
  for (const BenchCell& cell : cells) {
    for (size_t i = 0; i < cell.result.samples.size(); ++i) {
      const nlohmann::ordered_json record = RecordJson(cell, i);
      if (csv && first) file << CsvLine(record, /*names=*/true) << "\n";
      file << (csv ? CsvLine(record, /*names=*/false) : record.dump()) << "\n";
      first = false;
    }
  }
  file.close();
  return file ? absl::OkStatus() : absl::InternalError(absl::StrCat("can't write ", path));
}

}  // namespace headstart
