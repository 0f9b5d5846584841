#include "client/commands/request_report.h"

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/strip.h"
#include "client/commands/command_flags.h"
#include "client/page_names.h"

namespace headstart {

double Seconds(const google::protobuf::Duration& duration) {
  return static_cast<double>(duration.seconds()) + duration.nanos() * 1e-9;
}

nlohmann::json SecondsOrNull(bool known, const google::protobuf::Duration& duration) {
  return known ? nlohmann::json(Seconds(duration)) : nlohmann::json();
}

namespace {

// The parts of the time to first token, in the order of the wire format.
std::vector<std::pair<const char*, double>> TimeParts(const v1::PrefillStatistics& statistics) {
  return {{"queue", Seconds(statistics.queue())},
          {"selection", Seconds(statistics.selection())},
          {"attention", Seconds(statistics.attention())},
          {"other_compute", Seconds(statistics.other_compute())},
          {"gave_way", Seconds(statistics.gave_way())},
          {"exposed_transfer", Seconds(statistics.exposed_transfer())}};
}

// A bar of `width` cells for a value in [0, 1], in eighths of a cell.
std::string Bar(double value, int width) {
  static constexpr const char* kEighths[] = {"", "▏", "▎", "▍", "▌", "▋", "▊", "▉"};
  const int eighths = static_cast<int>(std::lround(std::clamp(value, 0.0, 1.0) * width * 8));
  std::string bar;
  for (int i = 0; i < eighths / 8; ++i) bar += "█";
  return bar + kEighths[eighths % 8];
}

std::string DtypeName(v1::KvDtype dtype) {
  absl::string_view name = v1::KvDtype_Name(dtype);
  absl::ConsumePrefix(&name, "KV_DTYPE_");
  return absl::AsciiStrToLower(name);
}

std::string AlgorithmName(v1::AttentionProvenance::Algorithm algorithm) {
  absl::string_view name = v1::AttentionProvenance::Algorithm_Name(algorithm);
  absl::ConsumePrefix(&name, "ALGORITHM_");
  return absl::AsciiStrToLower(name);
}

// "below_dense_limit"; empty where there is none.
std::string DenseReasonName(const v1::AttentionProvenance& attention) {
  if (attention.dense_reason() == v1::AttentionProvenance::DENSE_REASON_UNSPECIFIED) return "";
  absl::string_view name = v1::AttentionProvenance::DenseReason_Name(attention.dense_reason());
  absl::ConsumePrefix(&name, "DENSE_REASON_");
  return absl::AsciiStrToLower(name);
}

std::string BudgetName(v1::BudgetRule rule) {
  absl::string_view name = v1::BudgetRule_Name(rule);
  absl::ConsumePrefix(&name, "BUDGET_RULE_");
  return absl::AsciiStrToLower(name);
}

std::string DescribeAttention(const v1::AttentionProvenance& attention) {
  const v1::AttentionOptions& options = attention.options();
  std::string text = AlgorithmName(attention.algorithm());
  if (const std::string reason = DenseReasonName(attention); !reason.empty())
    absl::StrAppend(&text, ", ", reason);
  if (attention.algorithm() == v1::AttentionProvenance::ALGORITHM_PROXY_ATTN) {
    absl::StrAppendFormat(&text, ", %s: g=%d, stride %d, budget %s, gamma %.2f, floor %d tokens",
                          PresetName(options.preset()), options.num_proxies(), options.stride(),
                          BudgetName(options.budget()), options.gamma(), options.floor_tokens());
  }
  return text;
}

std::string FormatTimes(const PrefillOutcome& outcome) {
  const v1::PrefillStatistics& statistics = outcome.completed.statistics();
  const double total = Seconds(statistics.total());
  const double seen = absl::ToDoubleSeconds(outcome.timing.completed);
  std::string text = absl::StrFormat("time to first token  %9.3f s  %8.0f tokens/s\n", seen,
                                     outcome.completed.manifest().num_tokens() / seen);
  for (const auto& [name, seconds] : TimeParts(statistics)) {
    const double share = total > 0 ? seconds / total : 0.0;
    absl::StrAppendFormat(&text, "  %-18s %9.3f s  %7.1f %%  %s\n", name, seconds, 100 * share,
                          Bar(share, 20));
  }
  absl::StrAppendFormat(&text, "  %-18s %9.3f s  (connection and client)\n", "outside the server",
                        seen - total);
  if (outcome.accepted.has_predicted_ttft()) {
    absl::StrAppendFormat(&text, "  %-18s %9.3f s  (when it was accepted)\n", "predicted",
                          Seconds(outcome.accepted.predicted_ttft()));
  }
  return text;
}

std::string FormatPrefix(const v1::KvManifest& manifest) {
  std::string text = absl::StrFormat("prefix  %d of %d tokens cached", manifest.cached_tokens(),
                                     manifest.num_tokens());
  if (manifest.cached_tokens() > 0)
    absl::StrAppend(&text, " (", AlgorithmName(manifest.cached_algorithm()), ")");
  absl::StrAppendFormat(&text, ", KV of %d not sent\n", manifest.skip_tokens());
  return text;
}

std::string DescribeConnections(const PrefillOutcome& outcome) {
  std::string text =
      absl::StrCat(outcome.connections, outcome.connections == 1 ? " connection" : " connections");
  if (outcome.resumes > 0) absl::StrAppend(&text, " (", outcome.resumes, " times resumed)");
  return text;
}

std::string FormatKv(const PrefillOutcome& outcome) {
  const v1::Completed& completed = outcome.completed;
  const v1::KvLayout& layout = completed.manifest().layout();
  return absl::StrFormat(
      "KV  %.1f MB in %d chunks on %s at %.3f GB/s, first after %.3f s, last after %.3f s\n"
      "    %d layers, %d KV heads, head_dim %d, %s\n",
      completed.kv_bytes() / 1e6, completed.num_chunks(), DescribeConnections(outcome),
      KvGigabytesPerSecond(outcome), absl::ToDoubleSeconds(outcome.timing.first_chunk),
      absl::ToDoubleSeconds(outcome.timing.last_chunk), layout.num_layers(), layout.num_kv_heads(),
      layout.head_dim(), DtypeName(layout.dtype()));
}

std::string FormatSparsity(const v1::Completed& completed) {
  const double density = Density(completed);
  std::string text = absl::StrFormat(
      "attention  %s\nsparsity  %.3f: %.1f %% of the causal blocks ran",
      DescribeAttention(completed.manifest().attention()), 1 - density, 100 * density);
  if (completed.statistics().dense_fallbacks() > 0) {
    absl::StrAppendFormat(&text, ", %d dense fallbacks", completed.statistics().dense_fallbacks());
  }
  text += "\n";
  int layer = 0;
  for (const float layer_density : completed.manifest().layer_density()) {
    absl::StrAppendFormat(&text, "  layer %3d  %5.3f  %s\n", layer++, 1 - layer_density,
                          Bar(1 - layer_density, 40));
  }
  return text;
}

nlohmann::json AttentionJson(const v1::Completed& completed) {
  const v1::AttentionProvenance& attention = completed.manifest().attention();
  const v1::AttentionOptions& options = attention.options();
  const auto& densities = completed.manifest().layer_density();
  return {{"algorithm", AlgorithmName(attention.algorithm())},
          {"dense_reason", DenseReasonName(attention)},
          {"preset", PresetName(options.preset())},
          {"num_proxies", options.num_proxies()},
          {"stride", options.stride()},
          {"budget", BudgetName(options.budget())},
          {"gamma", options.gamma()},
          {"floor_tokens", options.floor_tokens()},
          {"sink_blocks", options.sink_blocks()},
          {"local_blocks", options.local_blocks()},
          {"dense_tail_blocks", options.dense_tail_blocks()},
          {"dense_below_tokens", options.dense_below_tokens()},
          {"executed_blocks", completed.statistics().executed_blocks()},
          {"causal_blocks", completed.statistics().causal_blocks()},
          {"dense_fallbacks", completed.statistics().dense_fallbacks()},
          {"density", Density(completed)},
          {"layer_density", std::vector<float>(densities.begin(), densities.end())}};
}

nlohmann::json PrefixJson(const v1::KvManifest& manifest) {
  nlohmann::json names = nlohmann::json::array();
  absl::string_view left = manifest.page_hashes();
  for (; left.size() >= kPageNameBytes; left.remove_prefix(kPageNameBytes))
    names.push_back(absl::BytesToHexString(left.substr(0, kPageNameBytes)));
  nlohmann::json algorithm;
  if (manifest.cached_tokens() > 0) algorithm = AlgorithmName(manifest.cached_algorithm());
  return {{"cached_tokens", manifest.cached_tokens()},
          {"cached_algorithm", algorithm},
          {"skip_tokens", manifest.skip_tokens()},
          {"page_names", names}};
}

// "QUEUE_FULL"; empty: it would be accepted.
std::string RefusalName(const v1::EstimateResponse& estimate) {
  if (estimate.refusal() == v1::ERROR_REASON_UNSPECIFIED) return "";
  absl::string_view name = v1::ErrorReason_Name(estimate.refusal());
  absl::ConsumePrefix(&name, "ERROR_REASON_");
  return std::string(name);
}

nlohmann::json KvJson(const PrefillOutcome& outcome) {
  const v1::KvLayout& layout = outcome.completed.manifest().layout();
  return {{"bytes", outcome.completed.kv_bytes()},
          {"chunks", outcome.completed.num_chunks()},
          {"connections", outcome.connections},
          {"resumes", outcome.resumes},
          {"gigabytes_per_second", KvGigabytesPerSecond(outcome)},
          {"num_layers", layout.num_layers()},
          {"num_kv_heads", layout.num_kv_heads()},
          {"head_dim", layout.head_dim()},
          {"dtype", DtypeName(layout.dtype())}};
}

}  // namespace

double Density(const v1::Completed& completed) {
  const v1::PrefillStatistics& statistics = completed.statistics();
  if (statistics.causal_blocks() == 0) return 1.0;
  return static_cast<double>(statistics.executed_blocks()) /
         static_cast<double>(statistics.causal_blocks());
}

absl::Duration ExposedTransfer(const v1::Completed& completed) {
  return absl::Seconds(Seconds(completed.statistics().exposed_transfer()));
}

double KvGigabytesPerSecond(const PrefillOutcome& outcome) {
  const double seconds = absl::ToDoubleSeconds(outcome.timing.last_chunk - outcome.timing.manifest);
  return seconds > 0 ? static_cast<double>(outcome.completed.kv_bytes()) / seconds / 1e9 : 0.0;
}

std::string FormatReport(const PrefillOutcome& outcome) {
  const v1::KvManifest& manifest = outcome.completed.manifest();
  const v1::FirstToken& token = outcome.completed.first_token();
  return absl::StrCat(
      absl::StrFormat("request %s  model %s  prompt %d tokens\n",
                      absl::Utf8SafeCEscape(outcome.accepted.request_id()),
                      absl::Utf8SafeCEscape(manifest.model()), manifest.num_tokens()),
      FormatTimes(outcome), FormatPrefix(manifest), FormatKv(outcome),
      FormatSparsity(outcome.completed),
      absl::StrFormat("first token  %d  (logprob %.4f)\n", token.id(), token.logprob()));
}

nlohmann::json ReportJson(const PrefillOutcome& outcome) {
  const v1::Completed& completed = outcome.completed;
  const PrefillTiming& timing = outcome.timing;
  nlohmann::json server = {{"total_seconds", Seconds(completed.statistics().total())}};
  for (const auto& [name, seconds] : TimeParts(completed.statistics()))
    server[absl::StrCat(name, "_seconds")] = seconds;
  return {{"request_id", outcome.accepted.request_id()},
          {"model", completed.manifest().model()},
          {"model_hash", completed.manifest().model_hash()},
          {"prompt_tokens", completed.manifest().num_tokens()},
          {"attempts", outcome.attempts},
          {"queue_requests", outcome.accepted.queue_requests()},
          {"queue_tokens", outcome.accepted.queue_tokens()},
          {"first_token",
           {{"id", completed.first_token().id()}, {"logprob", completed.first_token().logprob()}}},
          {"ttft_seconds", absl::ToDoubleSeconds(timing.completed)},
          {"predicted_ttft_seconds",
           SecondsOrNull(outcome.accepted.has_predicted_ttft(), outcome.accepted.predicted_ttft())},
          {"prefix", PrefixJson(completed.manifest())},
          {"tokens_per_second",
           completed.manifest().num_tokens() / absl::ToDoubleSeconds(timing.completed)},
          {"server", server},
          {"client",
           {{"accepted_seconds", absl::ToDoubleSeconds(timing.accepted)},
            {"manifest_seconds", absl::ToDoubleSeconds(timing.manifest)},
            {"first_chunk_seconds", absl::ToDoubleSeconds(timing.first_chunk)},
            {"last_chunk_seconds", absl::ToDoubleSeconds(timing.last_chunk)},
            {"completed_seconds", absl::ToDoubleSeconds(timing.completed)}}},
          {"kv", KvJson(outcome)},
          {"attention", AttentionJson(completed)}};
}

std::string FormatEstimate(const v1::EstimateResponse& estimate) {
  std::string text = "would be accepted\n";
  if (const std::string refusal = RefusalName(estimate); !refusal.empty()) {
    text = absl::StrCat("would be refused: ", refusal);
    if (estimate.has_retry_after())
      absl::StrAppendFormat(&text, ", try again in %.3f s", Seconds(estimate.retry_after()));
    text += "\n";
  }
  if (estimate.has_predicted_ttft()) {
    absl::StrAppendFormat(&text, "time to first token  %9.3f s: queue %.3f s, compute %.3f s\n",
                          Seconds(estimate.predicted_ttft()), Seconds(estimate.predicted_queue()),
                          Seconds(estimate.predicted_compute()));
  } else {
    text += "time to first token  not known before prompts have run\n";
  }
  absl::StrAppendFormat(&text, "ahead  %d requests, %d tokens\nprefix  %d tokens cached\n",
                        estimate.queue_requests(), estimate.queue_tokens(),
                        estimate.cached_tokens());
  return text;
}

nlohmann::json EstimateJson(const v1::EstimateResponse& estimate) {
  const std::string refusal = RefusalName(estimate);
  const bool known = estimate.has_predicted_ttft();
  return {
      {"accepted", refusal.empty()},
      {"refusal", refusal.empty() ? nlohmann::json() : nlohmann::json(refusal)},
      {"retry_after_seconds", SecondsOrNull(estimate.has_retry_after(), estimate.retry_after())},
      {"predicted_ttft_seconds", SecondsOrNull(known, estimate.predicted_ttft())},
      {"predicted_queue_seconds", SecondsOrNull(known, estimate.predicted_queue())},
      {"predicted_compute_seconds", SecondsOrNull(known, estimate.predicted_compute())},
      {"cached_tokens", estimate.cached_tokens()},
      {"queue_requests", estimate.queue_requests()},
      {"queue_tokens", estimate.queue_tokens()}};
}

}  // namespace headstart
